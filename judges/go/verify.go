// Command verify judges one certification path with Go's crypto/x509.
//
//	verify -root ROOT.pem -untrusted CHAIN.pem -leaf LEAF.pem -purpose client|server
//
// It prints "accept" or "reject: REASON" and exits 0 either way. Exit 2 means
// that it could not judge.
package main

import (
	"crypto/x509"
	"encoding/pem"
	"flag"
	"fmt"
	"os"
)

func main() {
	rootPath := flag.String("root", "", "trust anchors, PEM")
	untrustedPath := flag.String("untrusted", "", "intermediates, PEM")
	leafPath := flag.String("leaf", "", "end entity certificate, PEM")
	purpose := flag.String("purpose", "client", "client or server")
	flag.Parse()

	usage := map[string]x509.ExtKeyUsage{
		"client": x509.ExtKeyUsageClientAuth,
		"server": x509.ExtKeyUsageServerAuth,
	}
	wanted, known := usage[*purpose]
	if !known {
		fail(fmt.Errorf("unknown purpose %q", *purpose))
	}

	roots, intermediates := x509.NewCertPool(), x509.NewCertPool()
	for _, certificate := range read(*rootPath) {
		roots.AddCert(certificate)
	}
	for _, certificate := range read(*untrustedPath) {
		intermediates.AddCert(certificate)
	}
	leaves := read(*leafPath)
	if len(leaves) == 0 {
		fail(fmt.Errorf("%s holds no certificate", *leafPath))
	}

	_, err := leaves[0].Verify(x509.VerifyOptions{
		Roots:         roots,
		Intermediates: intermediates,
		KeyUsages:     []x509.ExtKeyUsage{wanted},
	})
	if err != nil {
		fmt.Printf("reject: %v\n", err)
		return
	}
	fmt.Println("accept")
}

func read(path string) []*x509.Certificate {
	rest, err := os.ReadFile(path)
	if err != nil {
		fail(err)
	}
	var found []*x509.Certificate
	for {
		var block *pem.Block
		block, rest = pem.Decode(rest)
		if block == nil {
			return found
		}
		if block.Type != "CERTIFICATE" {
			continue
		}
		certificate, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			// A certificate that Go cannot read is one that Go's users cannot accept.
			fmt.Printf("reject: %s: %v\n", path, err)
			os.Exit(0)
		}
		found = append(found, certificate)
	}
}

func fail(err error) {
	fmt.Fprintln(os.Stderr, err)
	os.Exit(2)
}
