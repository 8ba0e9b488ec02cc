// SPDX-License-Identifier: Apache-2.0

package api

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
)

const (
	// maxHead is the size of status line and headers together, maxBody the size of a body, in bytes.
	maxHead = 8 << 10
	maxBody = 1 << 20
)

// readReply reads one reply; anything but a status line, headers and a body of the length that they give is
// errdefs.ErrInvalidArgument, a reply that is cut io.ErrUnexpectedEOF.
func readReply(from io.Reader) (status int, body []byte, err error) {
	// A buffer that holds a whole head makes a longer line an error of ReadSlice.
	r := bufio.NewReaderSize(from, maxHead)
	head := 0
	line := func() (string, error) {
		b, err := r.ReadSlice('\n')
		head += len(b)
		switch {
		case errors.Is(err, bufio.ErrBufferFull), head > maxHead:
			return "", malformed("has a head of more than %d bytes", maxHead)
		case errors.Is(err, io.EOF):
			return "", io.ErrUnexpectedEOF
		case err != nil:
			return "", err
		}
		text, ok := strings.CutSuffix(string(b), "\r\n")
		if !ok {
			return "", malformed("has a line that does not end in CR LF")
		}
		return text, nil
	}
	first, err := line()
	if err != nil {
		return 0, nil, err
	}
	if status, err = parseStatus(first); err != nil {
		return 0, nil, err
	}
	length := -1
	for {
		header, err := line()
		if err != nil {
			return 0, nil, err
		}
		if header == "" {
			break
		}
		if err := parseHeader(header, &length); err != nil {
			return 0, nil, err
		}
	}
	body = make([]byte, max(length, 0))
	if _, err := io.ReadFull(r, body); err != nil {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return 0, nil, err
	}
	return status, body, nil
}

func parseStatus(line string) (int, error) {
	rest, ok := strings.CutPrefix(line, "HTTP/1.1 ")
	digits, _, _ := strings.Cut(rest, " ")
	status, err := strconv.ParseUint(digits, 10, 16)
	if !ok || err != nil || len(digits) != 3 || status < 200 {
		return 0, malformed("starts with %.64q, not with HTTP/1.1 and a final status", line)
	}
	return int(status), nil
}

// parseHeader takes the body's length from a header; length is -1 until there was one.
func parseHeader(header string, length *int) error {
	name, value, ok := strings.Cut(header, ":")
	switch {
	case !ok || name == "":
		return malformed("has %.64q for a header", header)
	case strings.EqualFold(name, "Transfer-Encoding"):
		return malformed("has a body without a length (%.64q)", header)
	case !strings.EqualFold(name, "Content-Length"):
		return nil
	}
	n, err := strconv.ParseUint(strings.TrimSpace(value), 10, 31)
	if err != nil || n > maxBody || *length >= 0 {
		return malformed("has %.64q: one length of at most %d bytes is taken", header, maxBody)
	}
	*length = int(n)
	return nil
}

func malformed(format string, a ...any) error {
	return fmt.Errorf("the VMM's reply %s: %w", fmt.Sprintf(format, a...), errdefs.ErrInvalidArgument)
}
