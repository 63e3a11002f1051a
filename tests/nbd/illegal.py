# Illegal requests through libnbd's Python bindings, with strict mode off: each must have the protocol's error, and the
# session must go on. Usage: illegal.py URI
import errno
import sys

import nbd

uri = sys.argv[1]


def connect(structured=True, contexts=()):
    handle = nbd.NBD()
    handle.set_strict_mode(0)
    handle.set_request_structured_replies(structured)
    for context in contexts:
        handle.add_meta_context(context)
    handle.connect_uri(uri)
    return handle


def error(call, *arguments, **named):
    try:
        call(*arguments, **named)
        return None
    except nbd.Error as failure:
        return errno.errorcode.get(failure.errnum, failure.errnum)


for structured in (False, True):
    h = connect(structured)
    size = h.get_size()
    nothing = lambda *_: 0
    cases = [
        ("read beyond the end", error(h.pread, 512, size), "EINVAL"),
        ("write beyond the end", error(h.pwrite, b"x" * 512, size), "ENOSPC"),
        ("trim beyond the end", error(h.trim, 512, size), "EINVAL"),
        ("zero beyond the end", error(h.zero, 512, size), "ENOSPC"),
        ("cache beyond the end", error(h.cache, 512, size), "EINVAL"),
        ("read with FUA", error(h.pread, 512, 0, nbd.CMD_FLAG_FUA), None),
        ("flush with FUA", error(h.flush, nbd.CMD_FLAG_FUA), None),
        ("write with DF", error(h.pwrite, b"x" * 512, 0, nbd.CMD_FLAG_DF), "EINVAL"),
        ("trim with NO_HOLE", error(h.trim, 512, 0, nbd.CMD_FLAG_NO_HOLE), "EINVAL"),
        ("zero with REQ_ONE", error(h.zero, 512, 0, nbd.CMD_FLAG_REQ_ONE), "EINVAL"),
        ("an unknown flag", error(h.flush, 0x4000), "EINVAL"),
        ("unaligned write", error(h.pwrite, b"x" * 3, 1), None),
        ("unaligned zero", error(h.zero, 3, 1), None),
        ("read with DF", error(h.pread_structured, 512, 0, nothing, nbd.CMD_FLAG_DF), None if structured else "EINVAL"),
        ("status without a context", error(h.block_status, 512, 0, nothing), "EINVAL" if structured else "ENOTSUP"),
    ]
    for what, got, wanted in cases:
        # libnbd refuses some itself, whatever its mode is.
        assert got == wanted or (what.startswith("status") and got), f"{what}: {got}, expected {wanted}"
    assert bytes(h.pread(4, 0)) == b"\0\0\0\0", "after all that"
    h.shutdown()

h = connect(contexts=["base:allocation"])
assert error(h.block_status, 512, h.get_size(), lambda *_: 0) == "EINVAL"
assert error(h.block_status, 0, 0, lambda *_: 0) == "EINVAL"
h.shutdown()
print("all as expected")
