/**
 * BPF programs in the kernel, for as long as they are held: what service meshes and network plugins
 * do to a host's own packets. Needs root and Python, which makes the system call bpf(2).
 *
 * @module
 */

import { Background } from "./processes.ts";

/** The instructions, and the calls that load them; include/uapi/linux/bpf.h. */
const PYTHON = `
import ctypes, os, socket, struct, sys, time
libc = ctypes.CDLL(None, use_errno=True)
SYSCALL = {"x86_64": 321, "aarch64": 280}[os.uname().machine]
def bpf(command, attributes):
    buffer = ctypes.create_string_buffer(attributes.ljust(128, b"\\0"))
    result = libc.syscall(SYSCALL, command, buffer, 128)
    if result < 0:
        raise OSError(ctypes.get_errno(), "bpf %d: %s" % (command, os.strerror(ctypes.get_errno())))
    return result
def op(code, to=0, source=0, offset=0, value=0):
    return struct.pack("<BBhi", code, source << 4 | to, offset, value)
def signed(value):
    return struct.unpack("<i", struct.pack("<I", value & 0xffffffff))[0]
move = lambda to, value: op(0xb7, to, value=signed(value))
copy = lambda to, source: op(0xbf, to, source)
add = lambda to, value: op(0x07, to, value=value)
load = lambda to, source, offset, size=0x61: op(size, to, source, offset)
store = lambda to, offset, source, size=0x63: op(size, to, source, offset)
put = lambda to, offset, value: op(0x62, to, offset=offset, value=signed(value))
call = lambda function: op(0x85, value=function)
unless = lambda register, value, skip: op(0x55, register, offset=skip, value=value)
end = lambda value: move(0, value) + op(0x95)
WORD, BYTE = 0x61, 0x71
def load_program(kind, attached, code):
    instructions = ctypes.create_string_buffer(code)
    license = ctypes.create_string_buffer(b"GPL")
    log = ctypes.create_string_buffer(65536)
    attributes = struct.pack("<IIQQIIQII16sII", kind, len(code) // 8, ctypes.addressof(instructions),
        ctypes.addressof(license), 1, len(log), ctypes.addressof(log), 0, 0, b"", 0, attached)
    try:
        return bpf(5, attributes)
    except OSError:
        print(log.value.decode(), flush=True)
        raise
def attach(program, target, attached):
    link = bpf(28, struct.pack("<IIII", program, target, attached, 0))
    print("attached", flush=True)
    return link

def connect4(group, address, port):
    code = (move(2, struct.unpack("<I", socket.inet_aton(address))[0]) + store(1, 4, 2) +
        move(2, socket.htons(port)) + store(1, 24, 2) + end(1))
    return attach(load_program(18, 10, code), os.open(group, os.O_RDONLY), 10)

# Puts bytes in front of each IPv4 packet of TCP that leaves, and makes it longer at its end.
def wrap(device, front, trailer):
    front = bytes.fromhex(front)
    size = len(front)
    body = copy(1, 6) + move(2, size) + move(3, 1) + move(4, 2) + call(50)
    room = -size - 8
    for at in range(0, size, 4):
        body += put(10, room + at, struct.unpack("<I", front[at:at + 4])[0])
    body += (copy(1, 6) + move(2, 14) + copy(3, 10) + add(3, room) + move(4, size) + move(5, 0) +
        call(9))
    if trailer > 0:
        body += copy(1, 6) + load(2, 6, 0) + add(2, trailer) + move(3, 0) + call(38)
    head = (copy(6, 1) + move(2, 23) + copy(3, 10) + add(3, -1) + move(4, 1) + call(26) +
        load(7, 10, -1, BYTE) + unless(7, 6, len(body) // 8))
    return attach(load_program(3, 47, head + body + end(0)), socket.if_nametoindex(device), 47)

# Takes them off each IPv4 packet of that protocol that arrives.
def unwrap(device, protocol, size):
    body = copy(1, 6) + move(2, -size) + move(3, 1) + move(4, 0) + call(50)
    head = (copy(6, 1) + move(2, 23) + copy(3, 10) + add(3, -1) + move(4, 1) + call(26) +
        load(7, 10, -1, BYTE) + unless(7, protocol, len(body) // 8))
    return attach(load_program(3, 46, head + body + end(0)), socket.if_nametoindex(device), 46)

`;

/** A cgroup of its own, which a program can be run in; `null` where cgroups of version 2 are missing. */
export class Group implements AsyncDisposable {
  private constructor(readonly folder: string) {}

  /** Where cgroups of version 2 are; `null` if nowhere. */
  static get root(): string | null {
    return /^cgroup2 (\S+) /m.exec(Deno.readTextFileSync("/proc/mounts"))?.[1] ?? null;
  }

  /** Makes one. */
  static async create(): Promise<Group> {
    const group = new Group(`${Group.root}/dscp-get-${Deno.pid}`);
    await Deno.mkdir(group.folder);
    return group;
  }

  /** The words before a command line that run it inside. */
  get under(): string[] {
    return ["sh", "-c", `echo $$ > ${this.folder}/cgroup.procs; exec "$@"`, "sh"];
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await Deno.remove(this.folder);
  }
}

/** Loads a program and waits until it is attached; it is detached when disposed of. */
async function hold(call: string, under: readonly string[]): Promise<Background> {
  const script = `${PYTHON}\nlink = ${call}\ntime.sleep(600)\n`;
  const process = new Background([...under, "python3", "-c", script]);
  await process.until((said) => said.includes("attached"));
  return process;
}

/** Whatever the processes of a cgroup connect to on IPv4 becomes this address and port. */
export async function redirectConnects(
  group: string,
  address: string,
  port: number,
): Promise<Background> {
  return await hold(`connect4(${JSON.stringify(group)}, "${address}", ${port})`, []);
}

/**
 * Puts bytes in front of each TCP packet on IPv4 that leaves by a device, behind its link header.
 *
 * @param front the bytes as hex, a multiple of 4, beginning with an IPv4 header
 * @param trailer how many bytes are added at the end
 */
export async function wrapLeaving(
  device: string,
  front: string,
  trailer: number,
  under: readonly string[],
): Promise<Background> {
  return await hold(`wrap("${device}", "${front.replaceAll(" ", "")}", ${trailer})`, under);
}

/** Takes `size` bytes off the front of each packet of a protocol that arrives at a device. */
export async function unwrapArriving(
  device: string,
  protocol: number,
  size: number,
  under: readonly string[],
): Promise<Background> {
  return await hold(`unwrap("${device}", ${protocol}, ${size})`, under);
}
