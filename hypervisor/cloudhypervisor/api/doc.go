// SPDX-License-Identifier: Apache-2.0

// Package api speaks Cloud Hypervisor's API: HTTP/1.1 over a unix socket, written by hand because the files that belong to a
// request must travel in the same sendmsg(2) as all of it, and because the peer is not trusted: a VMM that a guest took over
// answers what it likes. Replies are bounded in every part.
//
// Every call has a connection of its own, so that nothing of one is left for the next. There are no locks; a call has one
// goroutine beside the caller's, context.AfterFunc's, which ends with it.
package api
