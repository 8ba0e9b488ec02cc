// SPDX-License-Identifier: Apache-2.0

// Command netprobe answers what a test sends to a pod: it echoes each UDP datagram to the port in its argument, and each TCP connection
// there, until the other side has sent all that it has.
package main

import (
	"fmt"
	"io"
	"net"
	"os"
)

func main() {
	fmt.Println(serve(":" + os.Args[1]))
	os.Exit(1)
}

// serve returns only when it cannot go on.
func serve(address string) error {
	datagrams, err := net.ListenPacket("udp", address)
	if err != nil {
		return err
	}
	connections, err := net.Listen("tcp", address)
	if err != nil {
		return err
	}
	fmt.Println("ready")
	go func() {
		buf := make([]byte, 64<<10)
		for {
			n, from, err := datagrams.ReadFrom(buf)
			if err == nil {
				_, _ = datagrams.WriteTo(buf[:n], from)
			}
		}
	}()
	for {
		c, err := connections.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer c.Close()
			_, _ = io.Copy(c, c)
		}()
	}
}
