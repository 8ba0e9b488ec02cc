// SPDX-License-Identifier: Apache-2.0

// Package agentv1 has the messages of the protocol between shim and agent: types and ttrpc stubs generated from
// agent.proto, where each message is documented. Regenerate with `make proto`.
package agentv1

//go:generate -command proto protoc --proto_path=../.. --go_out=../.. --go-ttrpc_out=../..
//go:generate proto --go_opt=paths=source_relative --go-ttrpc_opt=paths=source_relative agent-protocol/v1/agent.proto
