// SPDX-License-Identifier: Apache-2.0

package vhostuser

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/cloister-project/cloister/hypervisor/vsock"
)

const (
	defaultMaxStreams   = 1024
	defaultBufferSize   = 256 << 10
	defaultCloseTimeout = 8 * time.Second // Linux's VSOCK_CLOSE_TIMEOUT
	maxBufferSize       = 16 << 20

	// trimInterval is how long pages of the guest stay in this process's resident memory after traffic.
	trimInterval = 2 * time.Second

	// Ports of outgoing streams are taken from here on, far from those that anybody listens on.
	firstEphemeralPort = 1 << 30
	lastEphemeralPort  = 1<<31 - 1
)

// Config describes a device. The zero value of everything but GuestCID is the default.
type Config struct {
	// GuestCID is the guest's context id: 3 to 2^32-2. It need not be unique on the host.
	GuestCID uint32
	// Logger is where faults go; log.L if nil.
	Logger *log.Entry
	// MaxStreams bounds the streams that exist at once, those included that wait for the guest's last answer. Default 1024.
	MaxStreams int
	// BufferSize is the credit that the guest gets for a stream, in bytes: so much is held for a reader that does not
	// read. Default 256 KiB.
	BufferSize int
	// CloseTimeout is how long a closed stream waits for the guest's RST. Default 8 s, as in Linux.
	CloseTimeout time.Duration
}

// Device is a vsock device for one VM. It implements vsock.Transport.
type Device struct {
	guestCID     uint32
	maxStreams   int
	bufferSize   uint32
	closeTimeout time.Duration
	log          *log.Entry
	chunks       sync.Pool

	conn     *net.UnixConn
	qemuFile *os.File
	done     chan struct{} // closed when the control goroutine has ended and everything is released
	down     chan struct{} // closed when err is set

	tx queue
	rx rxQueue

	rechecking   atomic.Bool // recheckTimer is set
	recheckTimer *time.Timer

	mu        sync.Mutex
	streams   map[portPair]*stream
	listeners map[uint32]*listener
	nextPort  uint32
	err       error // why the device ended

	mem     *memory // written with tx.mu and rx.mu held
	touched atomic.Bool
	trimmer *time.Timer
}

var _ vsock.Transport = (*Device)(nil)

// New makes a device and its connection to QEMU, and starts to serve it. Listeners can be made at once; Dial waits for
// the guest. The caller passes QEMUFile to QEMU and calls Close in the end.
func New(cfg Config) (*Device, error) {
	d, err := newDevice(cfg)
	if err != nil {
		return nil, err
	}
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("socket pair for the vsock device: %w", err)
	}
	ours := os.NewFile(uintptr(fds[0]), "vhost-user-vsock back end")
	d.qemuFile = os.NewFile(uintptr(fds[1]), "vhost-user-vsock front end")
	conn, err := net.FileConn(ours)
	_ = ours.Close() // FileConn has made its own
	if err != nil {
		return nil, errors.Join(fmt.Errorf("socket pair for the vsock device: %w", err), d.qemuFile.Close())
	}
	d.conn = conn.(*net.UnixConn)
	go newControl(d).serve()
	return d, nil
}

func newDevice(cfg Config) (*Device, error) {
	if cfg.GuestCID <= vsock.HostCID || cfg.GuestCID == 1<<32-1 {
		return nil, fmt.Errorf("vsock context id %d for a guest: 3 to 4294967294 are possible: %w", cfg.GuestCID, errdefs.ErrInvalidArgument)
	}
	if cfg.BufferSize < 0 || cfg.BufferSize > maxBufferSize || cfg.MaxStreams < 0 || cfg.CloseTimeout < 0 {
		return nil, fmt.Errorf("vsock device: buffer of %d bytes, %d streams, close timeout %s: %w",
			cfg.BufferSize, cfg.MaxStreams, cfg.CloseTimeout, errdefs.ErrInvalidArgument)
	}
	d := &Device{
		guestCID:     cfg.GuestCID,
		maxStreams:   orDefault(cfg.MaxStreams, defaultMaxStreams),
		bufferSize:   uint32(orDefault(cfg.BufferSize, defaultBufferSize)),
		closeTimeout: orDefault(cfg.CloseTimeout, defaultCloseTimeout),
		log:          cfg.Logger,
		done:         make(chan struct{}),
		down:         make(chan struct{}),
		tx:           queue{call: -1},
		rx:           rxQueue{queue: queue{call: -1}, guestCID: uint64(cfg.GuestCID)},
		streams:      make(map[portPair]*stream),
		listeners:    make(map[uint32]*listener),
		nextPort:     firstEphemeralPort + rand.Uint32N(1<<29),
		chunks:       sync.Pool{New: func() any { return new(chunk) }},
	}
	if d.log == nil {
		d.log = log.L
	}
	d.trimmer = time.AfterFunc(time.Hour, d.trim)
	d.trimmer.Stop()
	d.recheckTimer = time.AfterFunc(time.Hour, d.recheck)
	d.recheckTimer.Stop()
	d.tx.recheck, d.rx.recheck = d.recheckSoon, d.recheckSoon
	return d, nil
}

func orDefault[T int | time.Duration](v, def T) T {
	if v == 0 {
		return def
	}
	return v
}

// QEMUFile is QEMU's end of the connection, to be inherited by it: `-chardev socket,id=vs0,fd=N -device
// vhost-user-vsock-pci,chardev=vs0`. The caller closes it once QEMU runs; while it is open here, the end of QEMU is not
// seen. Close closes it too.
func (d *Device) QEMUFile() *os.File { return d.qemuFile }

// Done is closed when the device has ended: QEMU has gone, the guest has broken a ring, or Close was called.
func (d *Device) Done() <-chan struct{} { return d.down }

// Err tells why the device has ended, nil while it has not.
func (d *Device) Err() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.err
}

// Close implements vsock.Transport.
func (d *Device) Close() error {
	d.fail(net.ErrClosed)
	err := d.conn.Close()
	if errors.Is(err, net.ErrClosed) {
		err = nil // a second Close, or QEMU went first
	}
	<-d.done
	if e := d.qemuFile.Close(); e != nil && !errors.Is(e, os.ErrClosed) {
		err = errors.Join(err, e)
	}
	return err
}

// Dial implements vsock.Transport. The REQUEST waits in the queue until the guest's driver takes it. A guest whose
// driver is up answers it, with a refusal if nothing listens.
func (d *Device) Dial(ctx context.Context, port uint32) (vsock.Conn, error) {
	s, err := d.newOutgoing(port)
	if err != nil {
		return nil, fmt.Errorf("dial vsock port %d of the guest: %w", port, err)
	}
	d.check(d.rx.post(s, ctrlRequest, 0))
	select {
	case <-s.connected:
	case <-ctx.Done():
		state := "the guest has not answered"
		if !d.rx.started() {
			state = "the guest's vsock driver has not started"
		}
		s.end(net.ErrClosed, true)
		return nil, fmt.Errorf("dial vsock port %d of the guest: %s: %w", port, state, ctx.Err())
	}
	if s.refusal != nil {
		return nil, fmt.Errorf("dial vsock port %d of the guest: %w", port, s.refusal)
	}
	return s, nil
}

func (d *Device) newOutgoing(port uint32) (*stream, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	switch {
	case d.err != nil:
		return nil, d.err
	case len(d.streams) >= d.maxStreams:
		return nil, fmt.Errorf("%d streams are open already: %w", len(d.streams), errdefs.ErrResourceExhausted)
	}
	for {
		p := portPair{host: d.nextPort, guest: port}
		if d.nextPort++; d.nextPort > lastEphemeralPort {
			d.nextPort = firstEphemeralPort
		}
		if d.streams[p] == nil && d.listeners[p.host] == nil {
			s := newStream(d, p, stateConnecting, d.bufferSize)
			d.streams[p] = s
			return s, nil
		}
	}
}

func (d *Device) lookup(p portPair) *stream {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.streams[p]
}

func (d *Device) remove(s *stream) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.streams[s.ports] == s {
		delete(d.streams, s.ports)
	}
}

// check ends the device if err, which came out of the host-to-guest queue, is not nil. No lock later than tx.mu is held.
func (d *Device) check(err error) {
	if err != nil {
		d.fail(err)
	}
}

func (d *Device) failed() bool {
	select {
	case <-d.down:
		return true
	default:
		return false
	}
}

// fail ends all streams and listeners. The first reason counts. The rings stay mapped until the control goroutine ends.
func (d *Device) fail(err error) {
	d.mu.Lock()
	if d.err != nil {
		d.mu.Unlock()
		return
	}
	d.err = err
	close(d.down)
	streams := make([]*stream, 0, len(d.streams))
	for _, s := range d.streams {
		streams = append(streams, s)
	}
	for port, l := range d.listeners {
		delete(d.listeners, port)
		l.err = err
		close(l.done)
	}
	d.mu.Unlock()
	for _, s := range streams {
		s.end(err, false)
	}
	if !errors.Is(err, net.ErrClosed) && !errors.Is(err, errFrontEndGone) {
		d.log.WithError(err).Error("vsock device stopped")
	}
}

// touch notes that memory of the guest was used.
func (d *Device) touch() {
	if !d.touched.Load() && d.touched.CompareAndSwap(false, true) {
		d.trimmer.Reset(trimInterval)
	}
}

// trim runs a while after traffic.
func (d *Device) trim() {
	d.touched.Store(false)
	d.tx.mu.Lock()
	defer d.tx.mu.Unlock()
	if d.mem != nil {
		d.mem.trim()
	}
}
