# How long a pod's label takes from the API server to the kernel of another node, on which this runs.
# usage: label-latency.py KUBECTL KUBECONFIG CHANGES PODS     the pods of default are pod-0 to pod-(PODS-1), client and server
import glob, http.client, json, os, re, subprocess, sys, time

kubectl, kubeconfig, changes, pods = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
DEADLINE = 60
proxy = subprocess.Popen([kubectl, "--kubeconfig", kubeconfig, "proxy", "--port=0"], stdout=subprocess.PIPE, text=True)


def waited(what, condition):
    end = time.monotonic() + DEADLINE
    while True:
        found = condition()
        if found:
            return found
        if time.monotonic() > end:
            sys.exit(f"not within {DEADLINE} s: {what}")


def table():
    return subprocess.run(["nft", "list", "table", "inet", "sennit-policy"], capture_output=True, text=True).stdout


try:
    api = http.client.HTTPConnection("127.0.0.1", int(re.search(r":(\d+)", proxy.stdout.readline()).group(1)))

    def patch(pod, what):
        headers = {"Content-Type": "application/merge-patch+json"}
        api.request("PATCH", f"/api/v1/namespaces/default/pods/{pod}", json.dumps(what), headers)
        answer = api.getresponse()
        text = answer.read()
        if answer.status != 200:
            sys.exit(f"{answer.status}: {text[:500]}")

    def addressed(pod, address):
        patch(f"{pod}/status", {"status": {"phase": "Running", "podIP": address, "podIPs": [{"ip": address}]}})

    def own(pod):
        """An address in the prefix of the pod's node, as src/crowd.rs has them."""
        node = pod % 1000
        return f"10.100.{node // 4 % 256}.{node % 4 * 64 + 1 + pod // 1000}"

    def label(app):
        patch("client", {"metadata": {"labels": {"app": app}}})

    for n in range(pods):
        addressed(f"pod-{n}", own(n))
    addressed("server", "10.1.0.99")
    addressed("client", "10.100.0.60")
    held = waited(
        "the client's address in a set",
        lambda: re.search(r"set (\w_s_\w+4) \{[^}]*elements = \{[^}]*10\.100\.0\.60", table()),
    )
    get = ["nft", "get", "element", "inet", "sennit-policy", held.group(1), "{ 10.100.0.60 }"]
    # What came before is behind it.
    waited("the last pod's address", lambda: own(pods - 1) in table())
    agent = next(
        pid
        for pid in glob.glob("/proc/[0-9]*")
        if open(pid + "/comm").read() == "mesh-agent\n" and os.readlink(pid + "/ns/net") == os.readlink("/proc/self/ns/net")
    )

    def ticks():
        fields = open(agent + "/stat").read().rsplit(")", 1)[1].split()
        return int(fields[11]) + int(fields[12])

    took, before = [], ticks()
    for turn in range(changes):
        wanted = turn % 2 == 1
        began = time.monotonic()
        label("client" if wanted else "nobody")
        waited("a label", lambda: (subprocess.run(get, capture_output=True).returncode == 0) == wanted)
        took.append((time.monotonic() - began) * 1e3)
    used = (ticks() - before) * 1e3 / os.sysconf("SC_CLK_TCK") / changes
    memory = int(re.search(r"VmRSS:\s*(\d+)", open(agent + "/status").read()).group(1)) // 1024
finally:
    proxy.kill()
took.sort()
print(
    f"label to kernel over the API, {pods} pods, {changes} changes: p50 {took[len(took) // 2]:.1f} ms, "
    f"p99 {took[int(len(took) * 0.99)]:.1f} ms; agent {used:.1f} ms of CPU each, {memory} MiB"
)
