# Measures how long a victim's label takes to the kernel, and the agent's status, while a tenant of the same node does its worst:
# policies as large as etcd takes them, rewritten without a pause, and a storm of labels on its own pods.
# usage: tenant-latency.py KUBECTL KUBECONFIG CHANGES PODS     the tenant's pods are pod-0 to pod-(PODS-1) of namespace hostile
import glob, http.client, json, os, re, socket, subprocess, sys, threading, time

kubectl, kubeconfig, changes, pods = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
DEADLINE = 120
POLICIES = 40
# About 1 MB (etcd takes 1.5 MB), which is refused as a policy, and as much as counts as one: 4,096 ports.
RULES, FEW, PORTS = 30, 4, 1000
proxy = subprocess.Popen([kubectl, "--kubeconfig", kubeconfig, "proxy", "--port=0"], stdout=subprocess.PIPE, text=True)
port = int(re.search(r":(\d+)", proxy.stdout.readline()).group(1))
ended = threading.Event()


def request(api, method, path, what, kind="application/json"):
    api.request(method, path, json.dumps(what), {"Content-Type": kind})
    answer = api.getresponse()
    text = answer.read()
    return answer.status, text


def connection():
    return http.client.HTTPConnection("127.0.0.1", port, timeout=60)


def patch(api, path, what):
    status, text = request(api, "PATCH", "/api/v1/namespaces/" + path, what, "application/merge-patch+json")
    if status != 200:
        raise SystemExit(f"{status}: {text[:500]}")


def addressed(api, namespace, pod, address):
    patch(api, f"{namespace}/pods/{pod}/status", {"status": {"phase": "Running", "podIP": address, "podIPs": [{"ip": address}]}})


def prefix(api, node):
    """The first three numbers of a node's IPv4 pod prefix, a /24."""
    api.request("GET", f"/api/v1/nodes/{node}")
    return json.loads(api.getresponse().read())["spec"]["podCIDRs"][0].rsplit(".", 1)[0]


def waited(what, condition):
    end = time.monotonic() + DEADLINE
    while True:
        found = condition()
        if found:
            return found
        if time.monotonic() > end:
            raise SystemExit(f"not within {DEADLINE} s: {what}")


def table():
    return subprocess.run(["nft", "list", "table", "inet", "sennit-policy"], capture_output=True, text=True).stdout


def policy(index, turn):
    ports = lambda rule: [{"protocol": "TCP", "port": 1 + (2 * n + (rule + turn) % 2) % 65000} for n in range(PORTS)]
    rule = lambda n: {"from": [{"podSelector": {"matchLabels": {"x": f"y{index}-{n}"}}}], "ports": ports(n)}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": f"p{index}", "namespace": "hostile"},
        "spec": {"podSelector": {}, "policyTypes": ["Ingress"], "ingress": [rule(n) for n in range(RULES if index % 2 else FEW)]},
    }


written = [0, 0, 0]


def policies():
    api, turn = connection(), 0
    path = "/apis/networking.k8s.io/v1/namespaces/hostile/networkpolicies"
    while not ended.is_set():
        for index in range(POLICIES):
            if ended.is_set():
                return
            what = policy(index, turn)
            status, _ = request(api, "PUT", f"{path}/p{index}", what)
            if status == 404:
                status, text = request(api, "POST", path, what)
                if status != 201:
                    print(f"a policy was refused: {status} {text[:200]}", file=sys.stderr)
            written[0] += status in (200, 201)
            written[2] = max(written[2], len(json.dumps(what)))
        turn += 1


def labels():
    api, turn = connection(), 0
    while not ended.is_set():
        for n in range(pods):
            if ended.is_set():
                return
            patch(api, f"hostile/pods/pod-{n}", {"metadata": {"labels": {"x": f"y{turn % POLICIES}-{turn % RULES}"}}})
            written[1] += 1
            turn += 1


statuses = []


def status():
    while not ended.is_set():
        began = time.monotonic()
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(60)
        client.connect("/run/sennit/agent.sock")
        text = b""
        while part := client.recv(1 << 16):
            text += part
        statuses.append(((time.monotonic() - began) * 1e3, json.loads(text)["policy"]))
        ended.wait(0.05)


def resident():
    return int(re.search(r"VmRSS:\s*(\d+)", open(agent + "/status").read()).group(1)) // 1024


try:
    api = connection()
    near, far = (prefix(api, node) for node in ("aws-1", "aws-2"))
    addressed(api, "victim", "server", f"{near}.99")
    for n in range(pods):
        addressed(api, "hostile", f"pod-{n}", f"{near}.{100 + n}")
    client = f"{far}.60"
    addressed(api, "victim", "client", client)
    escaped = re.escape(client)
    held = waited("the client's address in a set", lambda: re.search(r"set (\w_s_\w+4) \{[^}]*elements = \{[^}]*" + escaped, table()))
    get = ["nft", "get", "element", "inet", "sennit-policy", held.group(1), "{ " + client + " }"]
    agent = next(
        pid
        for pid in glob.glob("/proc/[0-9]*")
        if open(pid + "/comm").read() == "mesh-agent\n" and os.readlink(pid + "/ns/net") == os.readlink("/proc/self/ns/net")
    )
    before = resident()
    threads = [threading.Thread(target=what, daemon=True) for what in (policies, labels, status)]
    for thread in threads:
        thread.start()
    waited("the tenant's policies", lambda: written[0] >= POLICIES)
    took, most = [], before
    for turn in range(changes):
        wanted = turn % 2 == 1
        began = time.monotonic()
        patch(api, "victim/pods/client", {"metadata": {"labels": {"app": "client" if wanted else "nobody"}}})
        answered = time.monotonic()
        waited("a label", lambda: (subprocess.run(get, capture_output=True).returncode == 0) == wanted)
        took.append(((time.monotonic() - answered) * 1e3, (answered - began) * 1e3))
        most = max(most, resident())
    over = statuses[-1][1].get("overBudget", [])
finally:
    ended.set()
    proxy.kill()
part = lambda all, share: sorted(all)[min(len(all) - 1, int(len(all) * share))]
kernel, server, asked = [t[0] for t in took], [t[1] for t in took], [s[0] for s in statuses]
print(
    f"beside {written[0]} policies of {written[2] // 1000} kB and {written[1]} labels of a tenant: a victim's label to the kernel, "
    f"{changes} changes: p50 {part(kernel, .5):.0f} ms, p99 {part(kernel, .99):.0f} ms, slowest {max(kernel):.0f} ms "
    f"(the API server took p99 {part(server, .99):.0f} ms for the write); status, {len(asked)} times: p50 {part(asked, .5):.0f} ms, "
    f"p99 {part(asked, .99):.0f} ms, slowest {max(asked):.0f} ms; agent {before} MiB before, {most} MiB at most; over budget: "
    + (", ".join(sorted({one["object"] for one in over})) or "nobody")
)
