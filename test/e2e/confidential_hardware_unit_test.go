// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/binary"
	"encoding/hex"
	"encoding/pem"
	"math/big"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/cloister-project/cloister/tee"
	"github.com/cloister-project/cloister/tee/firmware"
	"github.com/cloister-project/cloister/tee/initdata"
	"github.com/cloister-project/cloister/tee/se/attest"
	"github.com/cloister-project/cloister/tee/se/hostkey"
	"github.com/cloister-project/cloister/tee/se/image"
	"github.com/cloister-project/cloister/tee/snp/snpreport"
	"github.com/cloister-project/cloister/test/e2e/testdata/evidence/uvio"
	"github.com/cloister-project/cloister/test/harness"
)

// TestHardwareLaneReasons: a lane is left out for the reasons that `cloister check` gives, and for no other.
func TestHardwareLaneReasons(t *testing.T) {
	const (
		fine   = `{"what": "configuration", "result": "ok"}`
		tun    = `{"what": "tap devices", "result": "MISSING", "detail": "no /dev/net/tun", "fix": "load tun"}`
		note   = `{"what": "free ASIDs", "result": "note", "detail": "not counted"}`
		cpu    = `{"what": "CPU with SEV-SNP", "result": "MISSING", "detail": "it shows none", "fix": "take another"}`
		device = `{"what": "/dev/sev", "result": "MISSING", "detail": "is not there", "fix": "load ccp"}`
	)
	report := func(usable, node, platform string) string {
		return `{"usable": ` + usable + `, "node": [` + node +
			`], "platforms": [{"platform": "snp", "description": "x", "configured": true, "usable": true, "findings": [` + platform + `]}]}`
	}
	for _, tt := range []struct{ name, printed, reason, fault string }{
		{name: "usable", printed: report("true", fine, fine+","+note)},
		{name: "hardware missing", printed: report("false", fine, cpu+","+note+","+device),
			reason: "this host cannot launch snp VMs: CPU with SEV-SNP: it shows none; /dev/sev: is not there"},
		{name: "node lacks something", printed: report("false", fine+","+tun, fine),
			reason: "this host cannot launch snp VMs: tap devices: no /dev/net/tun"},
		{name: "both", printed: report("false", tun, device),
			reason: "this host cannot launch snp VMs: tap devices: no /dev/net/tun; /dev/sev: is not there"},
		{name: "usable and missing", printed: report("true", fine, cpu), fault: "calls snp usable and misses CPU with SEV-SNP"},
		{name: "neither usable nor missing", printed: report("false", fine, note), fault: "not usable and misses nothing"},
		{name: "no findings", printed: report("true", fine, ""), fault: "found nothing about snp"},
		{name: "nothing", printed: "", fault: "printed no JSON"},
		{name: "text", printed: "ok       configuration\n", fault: "printed no JSON"},
		{name: "cut", printed: report("false", fine, cpu)[:80], fault: "printed no JSON"},
		{name: "two values", printed: report("true", fine, fine) + "{}", fault: "printed no JSON"},
		{name: "another shape", printed: `[]`, fault: "printed no JSON"},
		{name: "empty", printed: `{}`, fault: "told of 0 platforms"},
		{name: "a configuration that is not valid",
			printed: `{"usable": false, "node": [{"what": "configuration", "result": "MISSING", "detail": "tee.policy: no number"}], ` +
				`"platforms": []}`,
			fault: "tee.policy: no number"},
		{name: "another platform", printed: `{"usable": true, "platforms": [{"platform": "tdx", "findings": [` + fine + `]}]}`,
			fault: `told of platform "tdx", snp was asked for`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			reason, err := laneReason(tee.SNP, tt.printed)
			assert.Equal(t, tt.reason, reason)
			if tt.fault == "" {
				require.NoError(t, err)
				return
			}
			require.ErrorContains(t, err, tt.fault)
		})
	}
}

// forged is an SNP report or a TDX quote with the values of a launch, made by the places of the fields in their
// specifications. Nobody signed it.
type forged struct {
	digest, bound, nonce []byte
	flags                uint64
}

// report: SEV-SNP Firmware ABI 1.58, table 23.
func (f forged) report() []byte {
	b := make([]byte, snpreport.Size)
	b[0x00] = 3
	binary.LittleEndian.PutUint64(b[0x08:], f.flags)
	copy(b[0x50:], f.nonce)
	copy(b[0x90:], f.digest)
	copy(b[0xc0:], f.bound[:32])
	return b
}

// quote: Intel TDX DCAP Quoting Library API, appendix A.3. The digest is MRTD's and all RTMRs'.
func (f forged) quote() []byte {
	b := make([]byte, 48+584)
	b[0], b[2], b[4] = 4, 2, 0x81
	body := b[48:]
	binary.LittleEndian.PutUint64(body[120:], f.flags)
	copy(body[136:], f.digest)
	copy(body[184:], f.bound[:48])
	for _, at := range []int{328, 376, 424, 472} {
		copy(body[at:], f.digest)
	}
	copy(body[520:], f.nonce)
	return append(b, 1, 0, 0, 0, 's')
}

// TestHardwareComparisons: what TestSNP and TestTDX compare, each by something that it must find.
func TestHardwareComparisons(t *testing.T) {
	doc, err := initdata.Parse([]byte(testInitdata))
	require.NoError(t, err)
	digest, nonce := bytes.Repeat([]byte{7}, 48), bytes.Repeat([]byte{9}, 64)
	bound := initdata.Bind(doc.Digest(), 64)
	text := hex.EncodeToString(digest)
	wantSNP := &tee.ReferenceValues{Platform: tee.SNP, Values: []tee.Value{
		{Name: "snp.launch_digest", Hex: text}, {Name: "snp.policy", Hex: "0000030000000000"}, {Name: "snp.host_data",
			Hex: hex.EncodeToString(bound[:32])},
	}}
	wantTDX := &tee.ReferenceValues{Platform: tee.TDX, Values: []tee.Value{
		{Name: "tdx.mrtd", Hex: text}, {Name: "tdx.rtmr0", Hex: text}, {Name: "tdx.rtmr1", Hex: text}, {Name: "tdx.rtmr2", Hex: text},
		{Name: "tdx.mrconfigid", Hex: hex.EncodeToString(bound[:48])}, {Name: "tdx.attributes", Hex: "0000001000000000"},
	}}
	for _, tt := range []struct {
		name, snp, tdx string // words of the errors, empty for none
		change         func(*forged)
	}{
		{name: "right", change: func(*forged) {}},
		{"another nonce", "the report data is", "the report data is", func(f *forged) { f.nonce = bound }},
		{"another launch", "the launch digest is", "tdx.mrtd is", func(f *forged) { f.digest = bytes.Repeat([]byte{8}, 48) }},
		{"another document", "the host data is", "MRCONFIGID is", func(f *forged) { f.bound = bytes.Repeat([]byte{1}, 64) }},
		{"debugging", "the policy allows debugging", "the attributes allow debugging", func(f *forged) { f.flags |= 1<<19 | 1 }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := forged{digest: digest, nonce: nonce, bound: bound, flags: 0x30000}
			q := s
			q.flags = 1 << 28
			tt.change(&s)
			tt.change(&q)
			for words, err := range map[*string]error{
				&tt.snp: checkSNPReport(s.report(), nonce, wantSNP, doc),
				&tt.tdx: checkTDXQuote(q.quote(), nonce, wantTDX, doc),
			} {
				if *words == "" {
					require.NoError(t, err)
				} else {
					require.ErrorContains(t, err, *words)
				}
			}
		})
	}
	// A value that is not predicted fits nothing.
	fine := forged{digest: digest, nonce: nonce, bound: bound, flags: 0x30000}
	require.ErrorContains(t, checkSNPReport(fine.report(), nonce, &tee.ReferenceValues{Platform: tee.SNP}, doc), "the launch digest is")
	require.Error(t, checkSNPReport(fine.quote(), nonce, wantSNP, doc))
	require.Error(t, checkTDXQuote(fine.report(), nonce, wantTDX, doc))
}

// TestHardwarePredictions: the launches that TestSNP and TestTDX compare have different predictions, which needs no hardware.
func TestHardwarePredictions(t *testing.T) {
	n := sharedNode(t)
	for name, differ := range map[tee.Name][]string{tee.SNP: {"snp.launch_digest", "snp.launch_digest"}, tee.TDX: {"", "tdx.rtmr2"}} {
		t.Run(string(name), func(t *testing.T) {
			path, doc := hardwareInitdata(t)
			onPlatform(t, n, handlerOf(name), name, laneSettings(t, name, path))
			if name == tee.TDX { // no build is accepted from the start
				ovmf, err := harness.SetupValue("CLOISTER_OVMF_INTELTDX")
				require.NoError(t, err)
				digest, err := firmware.DigestFile(ovmf, 64<<20)
				require.NoError(t, err)
				overlay(t, n, handlerOf(name), "62-firmware", "[tee.tdx]\nfirmware = '"+ovmf+"'\nfirmware_digests = ['"+digest+"']\n")
			}
			var all []*tee.ReferenceValues
			for _, c := range launchCases {
				t.Run(c.name, func(t *testing.T) {
					overlay(t, n, handlerOf(name), "65-launch", launchSettings(c.vcpus, c.parameter))
					all = append(all, predictedFor(t, n, name, c.vcpus))
				})
			}
			require.Len(t, all, len(launchCases))
			for i, value := range differ {
				if value != "" {
					assert.NotEmpty(t, valueOf(all[0], value))
					assert.NotEqual(t, valueOf(all[0], value), valueOf(all[i+1], value), "%s: %s", value, launchCases[i+1].name)
				}
			}
			bound := initdata.Bind(doc.Digest(), 48)
			if name == tee.SNP {
				assert.Equal(t, hex.EncodeToString(bound[:32]), valueOf(all[0], "snp.host_data"))
			} else {
				assert.Equal(t, hex.EncodeToString(bound), valueOf(all[0], "tdx.mrconfigid"))
			}
		})
	}
}

// TestUVCall: the memory of a call to the ultravisor, byte by byte as Linux' arch/s390/include/uapi/asm/uvdevice.h has it.
func TestUVCall(t *testing.T) {
	be := binary.BigEndian
	request, user := bytes.Repeat([]byte{0xaa}, 0x1234), bytes.Repeat([]byte{0xbb}, 64)
	call, err := uvio.NewCall(be, request, user, 64, 96)
	require.NoError(t, err)
	defer func() { assert.NoError(t, call.Close()) }()

	// _IOWR('u', 1, struct uvio_ioctl_cb): both directions, the size, the letter, the number.
	assert.EqualValues(t, uint32(3<<30|0x40<<16|'u'<<8|1), uint32(uvio.Attest))
	control := call.Control()
	require.Len(t, control, 0x40)
	at := be.Uint64(control[8:])
	want := make([]byte, 0x40) // flags, rc, rrc and what is reserved are zero
	be.PutUint64(want[0x08:], at)
	be.PutUint32(want[0x10:], 0x138)
	assert.Equal(t, want, control)

	argument := call.At(at, 0x138)
	require.Len(t, argument, 0x138)
	arcb, meas, add := be.Uint64(argument), be.Uint64(argument[8:]), be.Uint64(argument[0x10:])
	want = make([]byte, 0x138)
	be.PutUint64(want, arcb)
	be.PutUint64(want[0x08:], meas)
	be.PutUint64(want[0x10:], add)
	copy(want[0x18:], user)
	be.PutUint32(want[0x128:], 0x1234)
	be.PutUint32(want[0x12c:], 64)
	be.PutUint32(want[0x130:], 96)
	be.PutUint16(want[0x134:], 64)
	assert.Equal(t, want, argument)
	assert.Equal(t, request, call.At(arcb, len(request)))
	require.Len(t, call.At(meas, 64), 64)
	require.Len(t, call.At(add, 96), 96)
	assert.Nil(t, call.At(add, 97), "the room for the answer ends there")
	assert.Nil(t, call.At(at-0x41, 1))

	_, _, _, err = call.Answer()
	require.ErrorContains(t, err, "RC 0x0000")
	be.PutUint16(control[4:], 0x0105)
	be.PutUint16(control[6:], 0x0002)
	_, _, _, err = call.Answer()
	require.ErrorContains(t, err, "RC 0x0105, RRC 0x0002")

	for name, sizes := range map[string][4]int{
		"no request": {0, 0, 64, 0}, "long request": {1<<20 + 1, 0, 64, 0}, "long user data": {1, 257, 64, 0},
		"no room": {1, 0, 0, 0}, "too much room": {1, 0, 32<<10 + 1, 0}, "too much additional data": {1, 0, 64, 32<<10 + 1},
	} {
		_, err := uvio.NewCall(be, make([]byte, sizes[0]), make([]byte, sizes[1]), sizes[2], sizes[3])
		assert.Error(t, err, name)
	}
}

// TestUVCallAnswered has a program in the ultravisor's place answer a call through its memory, as the hardware would, and
// checks the answer the way that TestSE does.
func TestUVCallAnswered(t *testing.T) {
	be := binary.BigEndian
	host, err := hostkey.NewKey(rand.Reader)
	require.NoError(t, err)
	hash, err := hostkey.Hash(host.PublicKey())
	require.NoError(t, err)
	header := &image.Header{Slots: append(slices.Clone(hash[:]), make([]byte, hostkey.SlotSize-hostkey.HashSize)...)}
	request, secret, err := attest.NewRequest([]*ecdh.PublicKey{host.PublicKey()}, attest.ImageHostKey|attest.AttestHostKey, nil)
	require.NoError(t, err)
	exchange := attest.NewExchange(request, secret.Flags)
	user := attest.UserData([]byte("digest of a document"))
	call, err := uvio.NewCall(be, exchange.Request, user[:], int(exchange.MeasurementSize), int(exchange.AdditionalSize))
	require.NoError(t, err)
	defer func() { assert.NoError(t, call.Close()) }()

	control := call.Control()
	argument := call.At(be.Uint64(control[8:]), 0x138)
	got, err := attest.ParseRequest(call.At(be.Uint64(argument), int(be.Uint32(argument[0x128:]))))
	require.NoError(t, err)
	opened, err := got.Open(host)
	require.NoError(t, err)
	measured := attest.Measured{
		Header: header, CUID: [16]byte{1, 2, 3},
		User: argument[0x18:][:be.Uint16(argument[0x134:])], Additional: append(slices.Clone(hash[:]), hash[:]...),
	}
	measurement := attest.Measure(opened.Key, &opened.Nonce, measured)
	copy(call.At(be.Uint64(argument[0x08:]), int(be.Uint32(argument[0x12c:]))), measurement[:])
	copy(call.At(be.Uint64(argument[0x10:]), int(be.Uint32(argument[0x130:]))), measured.Additional)
	copy(argument[0x118:], measured.CUID[:])
	be.PutUint16(control[4:], uvio.Executed)

	answer := *exchange
	var cuid [16]byte
	answer.Measurement, answer.Additional, cuid, err = call.Answer()
	require.NoError(t, err)
	answer.User, answer.CUID = user[:], &cuid
	evidence, err := attest.Verify(secret, header, &answer)
	require.NoError(t, err)
	assert.Equal(t, image.Hex(user[:]), evidence.User)
	assert.Equal(t, image.Hex{1, 2, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}, evidence.CUID)
	answer.User = make([]byte, len(user))
	_, err = attest.Verify(secret, header, &answer)
	require.Error(t, err, "with another document")
}

// TestSEHostKeys: TestSE asks for evidence with the documents that it is given, and says so when there are none.
func TestSEHostKeys(t *testing.T) {
	keys, reason, err := seHostKeys("")
	require.NoError(t, err)
	assert.Empty(t, keys)
	assert.Contains(t, reason, "CLOISTER_TEST_SE_HOST_KEYS names no host key document")

	key, err := ecdsa.GenerateKey(elliptic.P521(), rand.Reader)
	require.NoError(t, err)
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	require.NoError(t, err)
	path := filepath.Join(t.TempDir(), "hkd.crt")
	require.NoError(t, os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600))
	keys, reason, err = seHostKeys(path + ":" + path)
	require.NoError(t, err)
	assert.Empty(t, reason)
	require.Len(t, keys, 2)
	public, err := key.PublicKey.ECDH()
	require.NoError(t, err)
	assert.True(t, public.Equal(keys[1]))

	_, _, err = seHostKeys(path + ":")
	require.ErrorContains(t, err, "CLOISTER_TEST_SE_HOST_KEYS")
}
