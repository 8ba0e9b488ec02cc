// SPDX-License-Identifier: Apache-2.0

package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"math/big"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"time"

	"github.com/cloister-project/cloister/test/harness"
)

// registryNames are the registries that clients reach by their names, over TLS, where they do not ask containerd for
// its hosts.toml. In the suites' mount namespace these names are those of the loopback device, see enterMountNamespace.
var registryNames = []string{"ghcr.io", "registry.k8s.io", "gcr.io"}

// serveTLS serves the node's registry on port 443 of its loopback device as well, under registryNames. It returns the
// path of the certificate to trust, which the node's clean-up removes.
func serveTLS(n *harness.Node) (authority string, stop func(), err error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return "", nil, err
	}
	now := time.Now()
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), DNSNames: registryNames, NotBefore: now.Add(-time.Hour), NotAfter: now.Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		return "", nil, err
	}
	authority = filepath.Join(n.Dir, "registry.pem")
	if err := os.WriteFile(authority, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o644); err != nil {
		return "", nil, err
	}
	listener, err := n.Listen("tcp", "127.0.0.1:443")
	if err != nil {
		return "", nil, err
	}
	proxy := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: registry})
	proxy.Transport = &http.Transport{DialContext: n.Dial}
	server := &http.Server{
		Handler: proxy, ReadHeaderTimeout: time.Minute,
		TLSConfig: &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}, MinVersion: tls.VersionTLS12},
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = server.ServeTLS(listener, "", "") // until stop
	}()
	return authority, func() {
		_ = server.Close()
		<-ended
	}, nil
}
