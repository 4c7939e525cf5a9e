# Measures how long a victim's label takes to the kernel, and the agent's status, while a tenant of the same node does its worst:
# policies as large as etcd takes them, rewritten without a pause, and a storm of labels on its own pods. The flood of DNS answers that
# may come with it is the caller's.
# usage: tenant.py KUBECTL KUBECONFIG CHANGES PODS RESOLVER DOES
# The tenant's pods are pod-0 to pod-(PODS-1) of the namespaces hostile and flooder. DOES: "nothing", or that it "writes" policies and
# labels. "begins" instead gives all pods their addresses, and measures nothing.
import glob, http.client, json, os, re, socket, struct, subprocess, sys, threading, time

kubectl, kubeconfig, changes, pods, resolver, does = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), *sys.argv[5:]
writes = does == "writes"
DEADLINE = 120
# Between two changes of the victim, in seconds: a flood has to last.
PAUSE = 0.2
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


def waited(what, condition, pause=0):
    end = time.monotonic() + DEADLINE
    while True:
        found = condition()
        if found:
            return found
        if time.monotonic() > end:
            raise SystemExit(f"not within {DEADLINE} s: {what}")
        time.sleep(pause)


def table():
    return subprocess.run(["nft", "list", "table", "inet", "sennit-policy"], capture_output=True, text=True).stdout


def attribute(kind, value):
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def asked(name, address):
    """A request to the kernel for one element of a set (NFT_MSG_GETSETELEM): nft would read all sets first."""
    nested = 0x8000
    key = attribute(nested | 1, attribute(nested | 1, attribute(1, socket.inet_aton(address))))
    body = attribute(1, b"sennit-policy\0") + attribute(2, name.encode() + b"\0") + attribute(nested | 3, key)
    return struct.pack("=IHHIIBBH", 20 + len(body), 10 << 8 | 13, 1, 1, 0, 1, 0, 0) + body


def holds(kernel, request):
    kernel.send(request)
    answer = kernel.recv(1 << 16)
    kind, error = struct.unpack_from("=H", answer, 4)[0], struct.unpack_from("=i", answer, 16)[0]
    if kind == 2 and error != -2:
        raise SystemExit(f"the kernel does not tell of an element: {os.strerror(-error)}")
    return kind != 2


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


def worked():
    """Seconds of CPU that the agent has used, all threads."""
    return sum(int(ticks) for ticks in open(agent + "/stat").read().rsplit(")", 1)[1].split()[11:13]) / os.sysconf("SC_CLK_TCK")


def begin(api, near, client):
    addressed(api, "victim", "server", f"{near}.99")
    for n in range(pods):
        addressed(api, "hostile", f"pod-{n}", f"{near}.{100 + n}")
        addressed(api, "flooder", f"pod-{n}", f"{near}.{150 + n}")
    addressed(api, "kube-system", "dns", resolver)
    waited("the flooder's addresses", lambda: re.search(r"map \w+egress4 \{[^}]*" + re.escape(f"{near}.{150 + pods - 1} "), table()), 0.5)
    waited("a copy of what is answered", lambda: "copied4" in table(), 0.5)
    addressed(api, "victim", "client", client)


try:
    api = connection()
    near, far = (prefix(api, node) for node in ("aws-1", "aws-2"))
    client = f"{far}.60"
    if does == "begins":
        begin(api, near, client)
        sys.exit()
    escaped = re.escape(client)
    held = waited("the client's address in a set", lambda: re.search(r"set (\w_s_\w+4) \{[^}]*elements = \{[^}]*" + escaped, table()), 0.5)
    kernel = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12)
    kernel.bind((0, 0))
    question = asked(held.group(1), client)
    agent = next(
        pid
        for pid in glob.glob("/proc/[0-9]*")
        if open(pid + "/comm").read() == "mesh-agent\n" and os.readlink(pid + "/ns/net") == os.readlink("/proc/self/ns/net")
    )
    before = resident()
    busy, since = worked(), time.monotonic()
    threads = [threading.Thread(target=what, daemon=True) for what in ((policies, labels) if writes else ()) + (status,)]
    for thread in threads:
        thread.start()
    if writes:
        waited("the tenant's policies", lambda: written[0] >= POLICIES)
    took, most = [], before
    time.sleep(5 * PAUSE)
    for turn in range(changes):
        wanted = turn % 2 == 1
        began = time.monotonic()
        patch(api, "victim/pods/client", {"metadata": {"labels": {"app": "client" if wanted else "nobody"}}})
        answered = time.monotonic()
        waited("a label", lambda: holds(kernel, question) == wanted, 0.001)
        took.append(((time.monotonic() - answered) * 1e3, (answered - began) * 1e3))
        most = max(most, resident())
        time.sleep(PAUSE)
    share = (worked() - busy) / (time.monotonic() - since)
    first, last = statuses[0][1], statuses[-1][1]
    made = [last[count] - first[count] for count in ("transactions", "changes")]
    over, problems = last.get("overBudget", []), last["problems"]
    ended.set()
    for thread in threads:
        thread.join(60)
    request(api, "DELETE", "/apis/networking.k8s.io/v1/namespaces/hostile/networkpolicies", {})
finally:
    ended.set()
    proxy.kill()
part = lambda all, share: sorted(all)[min(len(all) - 1, int(len(all) * share))]
kernel, server, asked = [t[0] for t in took], [t[1] for t in took], [s[0] for s in statuses]
print(
    (f"beside {written[0]} policies of {written[2] // 1000} kB and {written[1]} labels of a tenant: " if writes else "")
    + f"a victim's label to the kernel, "
    f"{changes} changes: p50 {part(kernel, .5):.0f} ms, p99 {part(kernel, .99):.0f} ms, slowest {max(kernel):.0f} ms "
    f"(the API server took p99 {part(server, .99):.0f} ms for the write); status, {len(asked)} times: p50 {part(asked, .5):.0f} ms, "
    f"p99 {part(asked, .99):.0f} ms, slowest {max(asked):.0f} ms; agent {before} MiB before, {most} MiB at most, {share:.2f} of a core, {made[1]} changes of the kernel in "
    f"{made[0]} transactions; {sum('dns-budget' in problem for problem in problems)} budgets of names used up; over budget: "
    + (", ".join(sorted({one["object"] for one in over})) or "nobody")
)
