// Command client connects to localhost over TLS by Go's crypto/tls, and prints what became of it.
//
//	client PORT CA_FILE
//
// Exit code 0: connected and verified; 1: refused, with the reason.
package main

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"os"
	"time"
)

func main() {
	pem, err := os.ReadFile(os.Args[2])
	if err != nil {
		fail(err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(pem) {
		fail(fmt.Errorf("no certificate in %s", os.Args[2]))
	}
	dialer := &net.Dialer{Timeout: 20 * time.Second}
	config := &tls.Config{RootCAs: roots, ServerName: "localhost"}
	connection, err := tls.DialWithDialer(dialer, "tcp", net.JoinHostPort("localhost", os.Args[1]), config)
	if err != nil {
		fail(err)
	}
	defer connection.Close()
	fmt.Println("connected")
}

func fail(err error) {
	fmt.Fprintln(os.Stderr, "refused:", err)
	os.Exit(1)
}
