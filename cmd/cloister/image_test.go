// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/cloister-project/cloister/tee/initdata"
	"github.com/cloister-project/cloister/tee/se/attest"
	"github.com/cloister-project/cloister/tee/se/hostkey"
	"github.com/cloister-project/cloister/tee/se/image"
	"github.com/cloister-project/cloister/virtcontainers/dryrun"
)

const testInitdata = "version = \"0.1.0\"\nalgorithm = \"sha256\"\n[data]\n\"policy\" = \"x\"\n"

// bench is a directory with all that an image is made of; nothing in it would boot.
type bench struct {
	dir string
	key *ecdsa.PrivateKey
}

func newBench(t *testing.T) *bench {
	t.Helper()
	b := &bench{dir: t.TempDir()}
	kernel := bytes.Repeat([]byte("kernel"), 20000)
	copy(kernel[0x10008:], "S390EP")
	binary.BigEndian.PutUint64(kernel[0x10430:], 4096)
	b.write(t, "kernel", kernel)
	b.write(t, "initrd", bytes.Repeat([]byte("initrd"), 3000))
	b.write(t, "stage3a.bin", append(bytes.Repeat([]byte{0x3a}, 11200), make([]byte, 24)...))
	b.write(t, "stage3b_reloc.bin", append(bytes.Repeat([]byte{0x3b}, 5524), make([]byte, 64)...))
	b.write(t, "initdata.toml", []byte(testInitdata))
	var err error
	b.key, err = ecdsa.GenerateKey(elliptic.P521(), rand.Reader)
	require.NoError(t, err)
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "machine"}, NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &b.key.PublicKey, b.key)
	require.NoError(t, err)
	b.write(t, "host.crt", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
	return b
}

func (b *bench) path(name string) string { return filepath.Join(b.dir, name) }

func (b *bench) write(t *testing.T, name string, content []byte) {
	t.Helper()
	require.NoError(t, os.WriteFile(b.path(name), content, 0o600))
}

func (b *bench) build(more ...string) []string {
	return append([]string{"image", "se", "build", "--kernel", b.path("kernel"), "--initrd", b.path("initrd"), "--stubs", b.dir,
		"-k", b.path("host.crt"), "--no-verify", "-o", b.path("se.img")}, more...)
}

func TestSEBuildAndInspect(t *testing.T) {
	b := newBench(t)
	b.write(t, "cmdline", []byte("console=ttyS0  panic=-1\n"))
	status, stdout, stderr := cloister(t, b.build("--cmdline", b.path("cmdline"), "--initdata", b.path("initdata.toml"))...)
	require.Equal(t, exitOK, status, stderr)
	assert.Contains(t, stderr, "WARNING: "+b.path("host.crt")+" was NOT VERIFIED")
	info, err := image.InspectFile(b.path("se.img"))
	require.NoError(t, err)
	assert.Contains(t, stdout, info.Tag.String())

	// What the machine sees: the line, with what was added to it.
	doc, err := initdata.Parse([]byte(testInitdata))
	require.NoError(t, err)
	line := "console=ttyS0 panic=-1 cloister.tee=se cloister.initdata=" + hex.EncodeToString(initdata.Bind(doc.Digest(), 64))
	assert.Contains(t, stdout, line)
	host, err := b.key.ECDH()
	require.NoError(t, err)
	f, err := os.Open(b.path("se.img"))
	require.NoError(t, err)
	defer f.Close()
	opened, err := image.Open(f, info.Size, host)
	require.NoError(t, err)
	assert.Equal(t, line, opened.Parameters)

	status, stdout, stderr = cloister(t, "image", "se", "inspect", b.path("se.img"))
	require.Equal(t, exitOK, status, stderr)
	for _, want := range []string{"tag        " + info.Tag.String(), "host key   " + info.HostKeyHashes[0].String(), "component",
		"pckmo-aes"} {
		assert.Contains(t, stdout, want)
	}
	status, stdout, _ = cloister(t, "image", "se", "inspect", "--json", b.path("se.img"))
	require.Equal(t, exitOK, status)
	var back struct {
		Tag string `json:"tag"`
	}
	require.NoError(t, json.Unmarshal([]byte(stdout), &back))
	assert.Equal(t, info.Tag.String(), back.Tag)
	left, err := filepath.Glob(b.path(".se.img.*"))
	require.NoError(t, err)
	assert.Empty(t, left)
}

// The measured values of an image are those that inspect shows.
func TestMeasureSE(t *testing.T) {
	b := newBench(t)
	status, _, stderr := cloister(t, b.build()...)
	require.Equal(t, exitOK, status, stderr)
	info, err := image.InspectFile(b.path("se.img"))
	require.NoError(t, err)
	b.write(t, "cloister.toml", []byte("[tee.se]\nimage = '"+b.path("se.img")+"'\n[sizing]\ndefault_memory_mib = 1024"))
	status, stdout, stderr := cloister(t, "measure", "--config", b.path("cloister.toml"), "--tee", "se")
	require.Equal(t, exitOK, status, stderr)
	for _, want := range []string{info.Tag.String(), info.PLD.String(), info.HostKeyHashes[0].String()} {
		assert.Contains(t, stdout, want)
	}
	// Nothing of an image depends on the number of CPUs.
	var one, many dryrun.Measurement
	_, stdout, stderr = cloister(t, "measure", "--config", b.path("cloister.toml"), "--tee", "se", "--json")
	require.NoError(t, json.Unmarshal([]byte(stdout), &one))
	assert.Empty(t, stderr)
	status, stdout, stderr = cloister(t, "measure", "--config", b.path("cloister.toml"), "--tee", "se", "--json", "--vcpus", "1-4")
	require.Equal(t, exitOK, status, stderr)
	require.NoError(t, json.Unmarshal([]byte(stdout), &many))
	require.Len(t, many.ReferenceValues, 1)
	assert.Equal(t, one, many)
	assert.Equal(t, "cloister: --vcpus changes nothing: the values of se do not depend on the number of CPUs\n", stderr)
}

func TestSEBuildKeepsWhatIsThere(t *testing.T) {
	b := newBench(t)
	b.write(t, "se.img", []byte("precious"))
	status, _, stderr := cloister(t, b.build()...)
	assert.Equal(t, exitNo, status)
	assert.Contains(t, stderr, "--force")
	content, err := os.ReadFile(b.path("se.img"))
	require.NoError(t, err)
	assert.Equal(t, "precious", string(content))
	status, _, stderr = cloister(t, b.build("--force")...)
	require.Equal(t, exitOK, status, stderr)
	_, err = image.InspectFile(b.path("se.img"))
	require.NoError(t, err)
}

func TestSEBuildRefuses(t *testing.T) {
	b := newBench(t)
	b.write(t, "lines", []byte("a\nb"))
	b.write(t, "debug", []byte("cloister.debug"))
	b.write(t, "short", []byte("short"))
	b.write(t, "rsa", []byte("no certificate"))
	b.write(t, "open", make([]byte, image.CCKSize))
	require.NoError(t, os.Chmod(b.path("open"), 0o644))
	for name, tc := range map[string]struct {
		args []string
		want string
	}{
		"kernel":           {[]string{"--kernel", b.path("initrd")}, "no raw s390x kernel"},
		"no kernel file":   {[]string{"--kernel", b.path("gone")}, "gone"},
		"stubs":            {[]string{"--stubs", b.path("gone")}, "stage3a.bin"},
		"two lines":        {[]string{"--cmdline", b.path("lines")}, "more than one line"},
		"debugging":        {[]string{"--cmdline", b.path("debug")}, "would open the guest"},
		"initdata":         {[]string{"--initdata", b.path("short")}, "initdata"},
		"key of 5 bytes":   {[]string{"--cck", b.path("short")}, "5 bytes"},
		"everybody's key":  {[]string{"--cck", b.path("open")}, "open to all users (mode 0644)"},
		"dump without key": {[]string{"--allow-dump"}, "customer communication key"},
		"document":         {[]string{"-k", b.path("rsa")}, b.path("rsa")},
		"same twice":       {[]string{"-k", b.path("host.crt")}, "twice"},
	} {
		status, stdout, stderr := cloister(t, b.build(tc.args...)...)
		assert.Equal(t, exitNo, status, name)
		assert.Empty(t, stdout, name)
		assert.Contains(t, stderr, tc.want, name)
		assert.NoFileExists(t, b.path("se.img"), name)
	}
}

// Without a proof nothing is sealed, and a proof that is none names what is wrong with it.
func TestSEBuildVerifies(t *testing.T) {
	b := newBench(t)
	args := []string{"image", "se", "build", "--kernel", b.path("kernel"), "--stubs", b.dir, "-k", b.path("host.crt"), "-o", b.path("se.img")}
	status, _, stderr := cloister(t, append(args, "--cert", b.path("host.crt"), "--root-ca", b.path("host.crt"))...)
	assert.Equal(t, exitNo, status)
	assert.Contains(t, stderr, "signing key certificate")
	status, _, stderr = cloister(t, append(args, "--cert", b.path("kernel"), "--root-ca", b.path("host.crt"))...)
	assert.Equal(t, exitNo, status)
	assert.Contains(t, stderr, "is no certificate")
	assert.NoFileExists(t, b.path("se.img"))
}

func TestSEInspectRefuses(t *testing.T) {
	b := newBench(t)
	for _, name := range []string{"kernel", "gone", "."} {
		status, stdout, stderr := cloister(t, "image", "se", "inspect", b.path(name))
		assert.Equal(t, exitNo, status)
		assert.Empty(t, stdout)
		assert.NotEmpty(t, stderr)
	}
}

func TestSEAttestRequest(t *testing.T) {
	b := newBench(t)
	args := []string{"image", "se", "attest-request", "-k", b.path("host.crt"), "--no-verify", "-o", b.path("request"), "--secret",
		b.path("secret")}
	status, stdout, stderr := cloister(t, args...)
	require.Equal(t, exitOK, status, stderr)
	assert.Contains(t, stdout, "KEEP SECRET")
	content, err := os.ReadFile(b.path("request"))
	require.NoError(t, err)
	exchange, err := attest.ParseExchange(content)
	require.NoError(t, err)
	_, err = attest.ParseRequest(exchange.Request)
	require.NoError(t, err)
	st, err := os.Stat(b.path("secret"))
	require.NoError(t, err)
	assert.Equal(t, os.FileMode(0o600), st.Mode().Perm())
	content, err = os.ReadFile(b.path("secret"))
	require.NoError(t, err)
	secret, err := attest.ParseSecret(content)
	require.NoError(t, err)
	assert.NotZero(t, secret.Key)
	assert.Len(t, secret.HostKeys, 1)

	status, _, stderr = cloister(t, args...)
	assert.Equal(t, exitNo, status)
	assert.Contains(t, stderr, "--force")
}

// answer plays the machine: it opens the request with the host's key and answers as the hardware would.
func (b *bench) answer(t *testing.T, user []byte) {
	t.Helper()
	content, err := os.ReadFile(b.path("request"))
	require.NoError(t, err)
	exchange, err := attest.ParseExchange(content)
	require.NoError(t, err)
	request, err := attest.ParseRequest(exchange.Request)
	require.NoError(t, err)
	host, err := b.key.ECDH()
	require.NoError(t, err)
	secret, err := request.Open(host)
	require.NoError(t, err)
	hash, err := hostkey.Hash(host.PublicKey())
	require.NoError(t, err)
	info, err := image.InspectFile(b.path("se.img"))
	require.NoError(t, err)
	cuid := [attest.CUIDSize]byte{1, 2, 3}
	exchange.User, exchange.CUID, exchange.Additional = user, &cuid, append(hash[:], hash[:]...)
	measurement := attest.Measure(secret.Key, &secret.Nonce, attest.Measured{
		Header: info.Header(), CUID: cuid, User: user, Additional: exchange.Additional,
	})
	exchange.Measurement = measurement[:]
	content, err = exchange.Marshal()
	require.NoError(t, err)
	b.write(t, "answer", content)
}

func TestSEAttestVerify(t *testing.T) {
	b := newBench(t)
	status, _, stderr := cloister(t, b.build("--initdata", b.path("initdata.toml"))...)
	require.Equal(t, exitOK, status, stderr)
	request := []string{"image", "se", "attest-request", "-k", b.path("host.crt"), "--no-verify", "-o", b.path("request"), "--secret",
		b.path("secret")}
	status, _, stderr = cloister(t, request...)
	require.Equal(t, exitOK, status, stderr)
	doc, err := initdata.Parse([]byte(testInitdata))
	require.NoError(t, err)
	user := attest.UserData(doc.Digest())
	b.answer(t, user[:])

	verify := []string{"image", "se", "attest-verify", b.path("answer"), "--secret", b.path("secret"), "--image", b.path("se.img")}
	status, stdout, stderr := cloister(t, append(verify, "--initdata", b.path("initdata.toml"))...)
	require.Equal(t, exitOK, status, stderr)
	assert.Contains(t, stdout, "the answer is good")
	assert.Contains(t, stdout, hex.EncodeToString(user[:]))
	status, stdout, stderr = cloister(t, append(verify, "--json")...)
	require.Equal(t, exitOK, status, stderr)
	assert.True(t, json.Valid([]byte(stdout)))

	// Another document, another image, another secret, no answer at all.
	b.write(t, "other.toml", []byte(strings.Replace(testInitdata, "x", "y", 1)))
	status, _, stderr = cloister(t, append(verify, "--initdata", b.path("other.toml"))...)
	assert.Equal(t, exitNo, status)
	assert.Contains(t, stderr, "not the digest of")
	status, _, stderr = cloister(t, append(b.build(), "--force")...)
	require.Equal(t, exitOK, status, stderr)
	status, stdout, stderr = cloister(t, verify...)
	assert.Equal(t, exitNo, status)
	assert.Empty(t, stdout)
	assert.Contains(t, stderr, "the measurement is not that of this image")
	b.write(t, "answer", []byte("no answer"))
	for _, bad := range [][]string{verify, {"image", "se", "attest-verify", b.path("gone"), "--secret", b.path("secret"), "--image",
		b.path("se.img")}} {
		status, _, stderr = cloister(t, bad...)
		assert.Equal(t, exitNo, status)
		assert.NotEmpty(t, stderr)
	}
	status, _, _ = cloister(t, "image", "se", "attest-verify", b.path("answer"))
	assert.Equal(t, exitUsage, status)
}
