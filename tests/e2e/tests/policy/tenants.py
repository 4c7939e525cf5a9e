#!/usr/bin/env python3
"""A tenant that writes policies as fast and as large as it may, beside a neighbour's changes. Runs on the victim's node.

tenants.py REGISTRY VICTIM SOCKET DEADLINE
REGISTRY: the directory of manifests. VICTIM: the IPv4 address of the neighbour's pod. SOCKET: the agent's.
DEADLINE: seconds that no status and no change may take. Prints the slowest; fails beyond the deadline.
"""
import glob
import json
import os
import re
import subprocess
import sys
import threading
import time

registry, victim, socket, deadline = sys.argv[1], sys.argv[2], sys.argv[3], float(sys.argv[4])
PORTS = 4095
own = os.readlink("/proc/self/ns/net")


def program():
    """The agent of this node, as it runs."""
    for pid in glob.glob("/proc/[0-9]*"):
        try:
            if open(pid + "/comm").read() == "mesh-agent\n" and os.readlink(pid + "/ns/net") == own:
                return os.readlink(pid + "/exe")
        except OSError:
            pass
    sys.exit("no agent runs here")


POLICIES = 24


def write(name, manifest):
    # As a whole or not at all: the name without a dot appears when it is complete.
    with open(f"{registry}/.{name}", "w") as file:
        json.dump(manifest, file)
    os.rename(f"{registry}/.{name}", f"{registry}/{name}")


def policy(namespace, name, ingress):
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"podSelector": {}, "policyTypes": ["Ingress"], "ingress": ingress},
    }


def largest(index, turn):
    ports = [{"protocol": "TCP", "port": 1 + 2 * n + (index + turn) % 2} for n in range(PORTS)]
    return [{"from": [{"podSelector": {"matchLabels": {"x": f"y{index}"}}}], "ports": ports}]


def chain():
    """The chain that judges what comes to the victim."""
    text = subprocess.run(["nft", "list", "table", "inet", "sennit-policy"], capture_output=True, text=True).stdout
    for block in re.findall(r"map \w+ingress4 \{.*?\n\t\}", text, re.S):
        found = re.search(re.escape(victim) + r" : jump (\w+)", block)
        if found:
            return found.group(1)
    return None


agent = program()
ended = threading.Event()
statuses = []


def ask():
    while not ended.is_set():
        began = time.monotonic()
        done = subprocess.run([agent, "status", "--socket", socket, "-o", "json"], capture_output=True)
        statuses.append((time.monotonic() - began, done.returncode))
        ended.wait(0.1)


def flood():
    turn = 0
    while not ended.is_set():
        for index in range(POLICIES):
            write(f"hostile-{index}.json", policy("hostile", f"p{index}", largest(index, turn)))
            if ended.wait(0.05):
                return
        turn += 1


threads = [threading.Thread(target=ask), threading.Thread(target=flood)]
for thread in threads:
    thread.start()
changes = []
for turn in range(20):
    before = chain()
    began = time.monotonic()
    write("victim.json", policy("victim", "p", [] if turn % 2 == 0 else [{}]))
    while chain() == before and time.monotonic() - began < deadline * 2:
        time.sleep(0.01)
    changes.append(time.monotonic() - began)
ended.set()
for thread in threads:
    thread.join()
# The last word of each.
write("victim.json", policy("victim", "p", []))
for index in range(POLICIES):
    write(f"hostile-{index}.json", policy("hostile", f"p{index}", largest(index, 0)))
changes.sort()
slowest = max(took for took, _ in statuses)
print(f"{len(changes)} changes of the neighbour: p50 {changes[len(changes) // 2]:.2f} s, slowest {changes[-1]:.2f} s; "
      f"{len(statuses)} statuses: slowest {slowest:.2f} s")
if changes[-1] > deadline or slowest > deadline or any(code for _, code in statuses):
    sys.exit("too late, or no answer")
