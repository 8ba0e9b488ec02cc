// SPDX-License-Identifier: Apache-2.0

// Command guest builds the guest image: the kernel as it is, and an initrd that holds the agent as /init and the kernel
// modules that it loads.
//
//	guest [-arch amd64|s390x] -kernel vmlinuz -modules lib/modules/RELEASE -agent cloister-agent -out DIR -version V
//
// DIR gets vmlinuz, initrd.img and guest.json, a manifest with digests. The same inputs give the same bytes on every
// machine: no time, user, path or order of the file system goes in.
//
// The initrd is a cpio archive (newc) with
//
//	/init                  the agent
//	/dev/console           so that the kernel can give the agent its first three files
//	/lib/modules/load      what to load and in which order, see package agent/boot
//	/lib/modules/*.ko      the modules, unpacked: the kernel needs longer to unpack xz than to read them
//
// The list's lines are "PHASE FILE [PARAMETERS]". All guests load the phases early and later; snp, tdx and se are for
// guests that are launched on the platform of that name.
//
// Which modules go in is decided here from a fixed list of wanted ones; their order comes from what the modules say of
// themselves (depends= and softdep= in .modinfo), so no depmod needs to have run. All files are inputs of whoever builds
// the image and trusted as such; checks here find mistakes (a wrong kernel, an agent that is not static), not attacks.
package main
