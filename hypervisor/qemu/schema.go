// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"slices"

	"github.com/cloister-project/cloister/hypervisor/qemu/qmp"
)

// schemaEntry is SchemaInfo of QEMU's qapi/introspect.json, as far as it matters here.
type schemaEntry struct {
	Name     string `json:"name"`
	MetaType string `json:"meta-type"`
	ArgType  string `json:"arg-type"`
	JSONType string `json:"json-type"`
	Members  []struct {
		Name string `json:"name"`
		Type string `json:"type"`
	} `json:"members"`
	Variants []struct {
		Case string `json:"case"`
		Type string `json:"type"`
	} `json:"variants"`
}

type schema []schemaEntry

func querySchema(ctx context.Context, c *qmp.Client) (schema, error) {
	var s schema
	return s, c.Execute(ctx, "query-qmp-schema", nil, &s)
}

func (s schema) entry(name string) (schemaEntry, bool) {
	i := slices.IndexFunc(s, func(e schemaEntry) bool { return e.Name == name })
	if i < 0 {
		return schemaEntry{}, false
	}
	return s[i], true
}

// object returns the properties that -object (and object-add, which has the same schema) takes for a type of object, with
// the names of their types in the schema; nil if there is no such type.
func (s schema) object(kind string) map[string]string {
	add, _ := s.entry("object-add")
	options, _ := s.entry(add.ArgType)
	for _, v := range options.Variants {
		if v.Case != kind {
			continue
		}
		props := make(map[string]string)
		e, _ := s.entry(v.Type)
		for _, m := range e.Members {
			props[m.Name] = m.Type
		}
		return props
	}
	return nil
}
