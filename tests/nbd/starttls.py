"""Agrees on structured replies and a context, then on TLS: of the first nothing may be left."""

import socket
import ssl
import struct
import sys

ACK, META, INFO = 1, 4, 3
LIST, STARTTLS, GO, STRUCTURED, SET_META = 3, 5, 7, 8, 10


def take(stream, count):
    data = b""
    while len(data) < count:
        more = stream.recv(count - len(data))
        assert more, "the stream ends"
        data += more
    return data


def option(stream, number, data=b""):
    stream.sendall(struct.pack(">8sII", b"IHAVEOPT", number, len(data)) + data)
    kinds = []
    while not kinds or (kinds[-1] != ACK and kinds[-1] < 1 << 31):
        _, _, kind, length = struct.unpack(">QIII", take(stream, 20))
        take(stream, length)
        kinds.append(kind)
    return kinds


def string(text):
    return struct.pack(">I", len(text)) + text


plain = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
take(plain, 18)
plain.sendall(struct.pack(">I", 3))
context = string(b"") + struct.pack(">I", 1) + string(b"base:allocation")
assert option(plain, STRUCTURED) == [ACK]
assert option(plain, SET_META, context) == [META, ACK]
assert option(plain, STARTTLS) == [ACK]
trust = ssl.create_default_context(cafile=sys.argv[2])
tls = trust.wrap_socket(plain, server_hostname="localhost")
# Structured replies are gone, so a context can't be chosen.
assert option(tls, SET_META, context)[-1] == 0x80000003
assert option(tls, STARTTLS)[-1] == 0x80000003, "TLS is on already"
assert option(tls, GO, string(b"") + b"\0\0") == [INFO, ACK]
tls.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 0, 7, 0, 512))
assert take(tls, 16) == struct.pack(">IIQ", 0x67446698, 0, 7), "a simple reply"
assert take(tls, 512) == bytes(512)
tls.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 7, 8, 0, 512))
assert take(tls, 16) == struct.pack(">IIQ", 0x67446698, 22, 8), "no context was chosen"
print("as expected")
