// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"

	"github.com/cloister-project/cloister/test/harness"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// stepBudget is for a single step in the pod: generous, since emulation on a loaded machine is slow.
const stepBudget = 3 * time.Minute

// job is the state of one run.
type job struct {
	handler   string
	report    *report
	artifacts harness.Artifacts
	node      *harness.Node
	pod       *harness.Pod
	web       *harness.Container
	client    *harness.Container
}

func (j *job) runc() bool { return j.handler == harness.HandlerRunc }

// handlers are those that the node serves. Beside the one of the job they are for a node that is kept: those of Cloister
// that need nothing more.
func (j *job) handlers() []string {
	if j.runc() {
		return []string{harness.HandlerRunc}
	}
	handlers := []string{j.handler}
	for _, h := range []string{harness.HandlerCloister, harness.HandlerClassic, harness.HandlerSample, harness.HandlerOptions} {
		if h != j.handler {
			handlers = append(handlers, h)
		}
	}
	return handlers
}

// start starts the private containerd and brings the images in.
func (j *job) start(ctx context.Context) error {
	err := j.report.stage(ctx, "start a private containerd", func(ctx context.Context) (_ string, err error) {
		j.node, err = harness.Start(ctx, harness.Options{Artifacts: j.artifacts, Handlers: j.handlers()})
		if err != nil {
			return "", err
		}
		return j.node.Dir, nil
	})
	if err != nil {
		return err
	}
	return j.step(ctx, "make and import a container image", func(ctx context.Context) (string, error) {
		return harness.BusyboxImage + ", from Debian's busybox-static", j.node.ImportBasics(ctx)
	})
}

func (j *job) step(ctx context.Context, name string, do func(context.Context) (string, error)) error {
	return j.report.stage(ctx, name, func(ctx context.Context) (string, error) {
		ctx, cancel := context.WithTimeout(ctx, stepBudget)
		defer cancel()
		return do(ctx)
	})
}

// runPod does everything that the main job does with a pod, except removing it.
func (j *job) runPod(ctx context.Context) error {
	for _, s := range []struct {
		name string
		do   func(context.Context) (string, error)
	}{
		{"start a pod with handler " + j.handler, j.startPod},
		{"run two containers, both print", j.runContainers},
		{"exec into one", j.exec},
		{"reach each other over the pod's loopback", j.loopback},
		{"reach the pod by its address", j.network},
		{"stop one and make it anew", j.renew},
		{"read stats", j.stats},
		{"measure memory", j.memory},
		{"prove that they run in a VM of their own", j.prove},
	} {
		if err := j.step(ctx, s.name, s.do); err != nil {
			return err
		}
	}
	return nil
}

func (j *job) startPod(ctx context.Context) (_ string, err error) {
	if j.pod, err = j.node.CRI().RunPod(ctx, harness.PodSpec{Name: "main-job", Handler: j.handler}); err != nil {
		return "", err
	}
	status, info, err := j.pod.Status(ctx)
	if err != nil {
		return "", err
	}
	if status.GetState() != runtimeapi.PodSandboxState_SANDBOX_READY {
		return "", fmt.Errorf("the pod is %s", status.GetState())
	}
	j.report.boot = timeline(info["bootTimeline"])
	result := "at " + status.GetNetwork().GetIp()
	for _, ip := range status.GetNetwork().GetAdditionalIps() {
		result += " and " + ip.GetIp()
	}
	for _, key := range []string{"hypervisor", "accelerator", "guestKernel"} {
		if info[key] != "" {
			result += ", " + info[key]
		}
	}
	return result, nil
}

// webSpec serves one page on port 8080 of the pod's loopback and other addresses.
func webSpec(page string) harness.ContainerSpec {
	return harness.ContainerSpec{Name: "web", Script: "mkdir -p /www && echo '" + page + "' > /www/index.html" +
		" && echo 'web: serving' && { httpd -f -p 8080 -h /www & trap 'kill $!; exit 0' TERM; wait $!; }"}
}

func (j *job) runContainers(ctx context.Context) (_ string, err error) {
	if j.web, err = j.pod.Run(ctx, webSpec("first page")); err != nil {
		return "", err
	}
	j.client, err = j.pod.Run(ctx, harness.ContainerSpec{Name: "client",
		Script: "echo \"client: hello from $(hostname)\"; trap 'exit 0' TERM; while :; do sleep 3600 & wait $!; done"})
	if err != nil {
		return "", err
	}
	return "'web: serving', 'client: hello from main-job'", errors.Join(
		j.web.WaitLog(ctx, "web: serving\n"),
		j.client.WaitLog(ctx, "client: hello from main-job\n"),
	)
}

func (j *job) exec(ctx context.Context) (string, error) {
	result, err := j.client.Exec(ctx, "sh", "-c", "echo out; echo err >&2; exit 42")
	if err != nil {
		return "", err
	}
	if want := (harness.ExecResult{Stdout: "out\n", Stderr: "err\n", ExitCode: 42}); result != want {
		return "", fmt.Errorf("got %+v, want %+v", result, want)
	}
	return "stdout, stderr and exit status 42 came back", nil
}

func (j *job) loopback(ctx context.Context) (string, error) {
	return j.fetch(ctx, "first page")
}

// fetch has the client get the web container's page. It repeats that until the server listens: it may have printed
// its line, and not have got so far.
func (j *job) fetch(ctx context.Context, want string) (string, error) {
	const try = "i=0; until wget -qO- http://127.0.0.1:8080/; do i=$((i+1)); [ $i -lt 50 ] || exit 1; usleep 100000; done"
	page, err := j.client.Output(ctx, "sh", "-c", try)
	if err != nil {
		return "", err
	}
	if page != want {
		return "", fmt.Errorf("client got %q from web, want %q", page, want)
	}
	return fmt.Sprintf("client got %q from web at 127.0.0.1:8080", page), nil
}

func (j *job) network(ctx context.Context) (string, error) {
	status, _, err := j.pod.Status(ctx)
	if err != nil {
		return "", err
	}
	addresses := []string{status.GetNetwork().GetIp()}
	for _, ip := range status.GetNetwork().GetAdditionalIps() {
		addresses = append(addresses, "["+ip.GetIp()+"]")
	}
	client := &http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{DialContext: j.node.Dial, DisableKeepAlives: true}}
	for _, a := range addresses {
		page, err := get(ctx, client, "http://"+a+":8080/")
		if err != nil {
			return "", err
		}
		if page != "first page\n" {
			return "", fmt.Errorf("http://%s:8080/ answered %q", a, page)
		}
	}
	return "over " + strings.Join(addresses, " and "), nil
}

func get(ctx context.Context, client *http.Client, url string) (string, error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return "", err
	}
	response, err := client.Do(request)
	if err != nil {
		return "", err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(io.LimitReader(response.Body, 1<<16))
	return string(body), err
}

func (j *job) renew(ctx context.Context) (_ string, err error) {
	before := j.web.ID
	if err := j.web.Stop(ctx, 20*time.Second); err != nil {
		return "", fmt.Errorf("stopping web: %w", err)
	}
	status, err := j.web.Wait(ctx)
	if err != nil {
		return "", err
	}
	if status.GetExitCode() != 0 {
		return "", fmt.Errorf("web ended with status %d (%s), SIGTERM should have made it 0", status.GetExitCode(), status.GetReason())
	}
	if err := j.web.Remove(ctx); err != nil {
		return "", fmt.Errorf("removing web: %w", err)
	}
	if j.web, err = j.pod.Run(ctx, webSpec("second page")); err != nil {
		return "", err
	}
	if _, err := j.fetch(ctx, "second page"); err != nil {
		return "", err
	}
	return fmt.Sprintf("%.12s ended in order, %.12s serves in its place", before, j.web.ID), nil
}

func (j *job) stats(ctx context.Context) (string, error) {
	var parts []string
	for _, c := range []*harness.Container{j.web, j.client} {
		s, err := c.Stats(ctx)
		if err != nil {
			return "", err
		}
		name := c.Config.GetMetadata().GetName()
		cpu, memory := s.GetCpu().GetUsageCoreNanoSeconds().GetValue(), s.GetMemory().GetUsageBytes().GetValue()
		if cpu == 0 || memory == 0 {
			return "", fmt.Errorf("stats of %s say %d ns of CPU and %d bytes of memory", name, cpu, memory)
		}
		parts = append(parts, fmt.Sprintf("%s: %.1f ms CPU, %d KiB", name, float64(cpu)/1e6, memory>>10))
		j.report.memory = append(j.report.memory, row{"container " + name, kib(int(memory >> 10))})
	}
	return strings.Join(parts, "; "), nil
}

func (j *job) memory(context.Context) (string, error) {
	var parts []string
	for _, p := range []struct{ name, prefix string }{
		{"shim", "containerd-shim"}, {"QEMU", "qemu-system"}, {"virtiofsd", "virtiofsd"},
	} {
		pids, err := j.node.Pids(p.prefix)
		if err != nil {
			return "", err
		}
		for _, pid := range pids {
			rss, err := harness.ResidentKiB(pid)
			if err != nil {
				return "", err
			}
			parts = append(parts, fmt.Sprintf("%s %s", p.name, kib(rss)))
			j.report.memory = append(j.report.memory, row{fmt.Sprintf("%s, resident (pid %d)", p.name, pid), kib(rss)})
		}
	}
	return strings.Join(parts, ", "), nil
}

func kib(n int) string { return fmt.Sprintf("%.1f MiB", float64(n)/1024) }

func (j *job) removePod(ctx context.Context) error {
	err := j.step(ctx, "remove the pod", func(ctx context.Context) (string, error) {
		return "", j.pod.Remove(ctx)
	})
	if err != nil {
		return err
	}
	return j.step(ctx, "look for anything left", func(ctx context.Context) (string, error) {
		leaks, err := j.node.Leaks(ctx)
		if err != nil {
			return "", err
		}
		if len(leaks) > 0 {
			return "", fmt.Errorf("left behind:\n  %s", strings.Join(leaks, "\n  "))
		}
		return "no process, link, mount, namespace, cgroup, socket or file", nil
	})
}

// end stops the node, in whatever state it is.
func (j *job) end(ctx context.Context, show bool) error {
	if j.node == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, stopBudget)
	defer cancel()
	if !show {
		return j.node.Stop(ctx)
	}
	return j.report.stage(ctx, "stop containerd", func(ctx context.Context) (string, error) { return "", j.node.Stop(ctx) })
}

// keep leaves everything up and says how to use it and how to end it.
func (j *job) keep() error {
	if err := j.node.Keep(); err != nil {
		return err
	}
	if err := j.report.print(); err != nil {
		return err
	}
	ctr, crictl, nerdctl := j.node.Usage()
	const config = "--runtime io.containerd.cloister.v2 --runtime-config-path"
	fmt.Printf(`The pod is left up. Everything of it is in %s; look at it with

  %s pods
  %s exec -it %.13s sh
  %s tasks ls
  %s run --rm -t %s %s %s one uname -a
  %s ps

and end it with

  make stop

`, j.node.Dir, crictl, crictl, j.client.ID, ctr, ctr, config, j.node.CloisterConfig, harness.BusyboxImage, nerdctl)
	return nil
}
