import assert from "node:assert/strict";
import {
  type Connection,
  DescriptorError,
  dial,
  fdOf,
  getTos,
  keepArrivals,
  readArrived,
  setTos,
} from "../ffi/mod.ts";
import { findConnection, socketOf } from "../ffi/fd.ts";
import * as libc from "../ffi/libc.ts";
import { AF_INET, AF_INET6, encode, SOCKADDR_SIZE } from "../ffi/sockaddr.ts";
import { TwinLinks } from "./support/namespaces.ts";
import { Capture } from "./support/packets.ts";
import { execute, openDescriptors, testWith } from "./support/processes.ts";
import { Random } from "./support/random.ts";
import { FarEnd } from "./support/servers.ts";

/** A pair of connected sockets in this process. */
class Pair implements Disposable {
  private constructor(readonly client: Deno.TcpConn, readonly server: Deno.TcpConn) {}

  static async open(listener: Deno.TcpListener): Promise<Pair> {
    const { hostname, port } = listener.addr;
    const [client, server] = await Promise.all([
      Deno.connect({ hostname, port }),
      listener.accept(),
    ]);
    return new Pair(client, server);
  }

  [Symbol.dispose](): void {
    for (const conn of [this.client, this.server]) {
      try {
        conn.close();
      } catch { /* the test closed it */ }
    }
  }
}

/** The inode of the socket behind a descriptor, as the kernel tells it. */
function inodeOf(fd: number): string {
  return Deno.readLinkSync(`/proc/self/fd/${fd}`);
}

/** The inode of the socket with these ports, from the kernel's own table of TCP sockets. */
function inodeByPorts(local: number, remote: number): string {
  const hex = (port: number) => port.toString(16).toUpperCase().padStart(4, "0");
  for (const file of ["/proc/net/tcp", "/proc/net/tcp6"]) {
    for (const line of Deno.readTextFileSync(file).split("\n")) {
      const fields = line.trim().split(/\s+/);
      if (fields[1]?.endsWith(`:${hex(local)}`) && fields[2].endsWith(`:${hex(remote)}`)) {
        return `socket:[${fields[9]}]`;
      }
    }
  }
  return "";
}

const portOf = (addr: Deno.Addr) => (addr as Deno.NetAddr).port;

for (const hostname of ["127.0.0.1", "::1"]) {
  Deno.test(`both ends of a connection within one process are told apart: ${hostname}`, async () => {
    using listener = Deno.listen({ hostname, port: 0 });
    using pair = await Pair.open(listener);
    const { client, server } = pair;
    assert.equal(
      inodeOf(fdOf(client)),
      inodeByPorts(portOf(client.localAddr), portOf(client.remoteAddr)),
    );
    assert.equal(
      inodeOf(fdOf(server)),
      inodeByPorts(portOf(server.localAddr), portOf(server.remoteAddr)),
    );
    assert.equal(inodeOf(fdOf(listener)), inodeByPorts(listener.addr.port, 0));
    setTos(client, 0xb8);
    assert.deepEqual([getTos(client), getTos(server), getTos(listener)], [0xb8, 0, 0]);
  });
}

Deno.test("an IPv4 client of a dual-stack listener is found on both sides", async () => {
  using listener = Deno.listen({ hostname: "::", port: 0 });
  const [client, server] = await Promise.all([
    Deno.connect({ hostname: "127.0.0.1", port: listener.addr.port }),
    listener.accept(),
  ]);
  assert.equal(setTos(client, 0xb8), 0xb8);
  assert.equal(setTos(server, 0x20), 0x20);
  assert.equal(getTos(server), 0x20);
  client.close();
  server.close();
});

Deno.test("a closed connection is not found, and the error names both ends", async () => {
  using listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  using pair = await Pair.open(listener);
  fdOf(pair.client);
  pair.client.close();
  const { localAddr, remoteAddr } = pair.client;
  assert.throws(() => fdOf(pair.client), (error) => {
    assert.ok(error instanceof DescriptorError);
    assert.ok(
      error.message.includes(`127.0.0.1:${portOf(localAddr)} to 127.0.0.1:${portOf(remoteAddr)}`),
      error.message,
    );
    return true;
  });
});

Deno.test("one matching end is not enough", async () => {
  using listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  using pair = await Pair.open(listener);
  const { localAddr, remoteAddr } = pair.client;
  const elsewhere = { ...remoteAddr as Deno.NetAddr, port: 1 };
  assert.throws(() => fdOf({ localAddr, remoteAddr: elsewhere }), DescriptorError);
  assert.throws(() => fdOf({ localAddr: elsewhere, remoteAddr }), DescriptorError);
  assert.throws(
    () => fdOf({ localAddr: listener.addr, remoteAddr: listener.addr }),
    DescriptorError,
  );
});

Deno.test("a UDP socket is never taken for a TCP one", () => {
  using listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  const server = Deno.listenDatagram({ transport: "udp", hostname: "127.0.0.1", port: 0 });
  assert.throws(
    () => fdOf({ addr: { ...server.addr as Deno.NetAddr, transport: "tcp" } }),
    DescriptorError,
  );
  assert.throws(() => fdOf({ addr: server.addr }), TypeError);
  assert.ok(fdOf(listener) > 0);
  server.close();
});

Deno.test("a connected UDP socket with both ends of a connection is not taken for it", async () => {
  using listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  using pair = await Pair.open(listener);
  const SOCK_DGRAM = 2, IPPROTO_UDP = 17;
  const udp = libc.socket(AF_INET, SOCK_DGRAM, IPPROTO_UDP);
  try {
    assert.equal(libc.bind(udp, encode(pair.client.localAddr as Deno.NetAddr)), 0);
    assert.equal(libc.connect(udp, encode(pair.client.remoteAddr as Deno.NetAddr)), 0);
    assert.equal(
      inodeOf(fdOf(pair.client)),
      inodeByPorts(portOf(pair.client.localAddr), portOf(pair.client.remoteAddr)),
    );
  } finally {
    libc.close(udp);
  }
});

Deno.test("two listeners on one address are an error, not a guess", () => {
  using first = Deno.listen({ hostname: "127.0.0.1", port: 0, reusePort: true });
  assert.ok(fdOf(first) > 0);
  using second = Deno.listen({ hostname: "127.0.0.1", port: first.addr.port, reusePort: true });
  assert.throws(() => fdOf(second), /both listen/);
});

Deno.test("a listener that may share its address is of its own family, whatever else is open", async () => {
  using listener = Deno.listen({ hostname: "::1", port: 0, reusePort: true });
  using _other = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  assert.equal(socketOf(listener).family, AF_INET6);
  assert.equal(setTos(listener, 0xb8), 0xb8);
  const client = await Deno.connect({ hostname: "::1", port: listener.addr.port });
  using server = await listener.accept();
  assert.equal(getTos(server), 0xb8);
  client.close();
});

Deno.test("among hundreds of connections, opened and closed in any order, each mark lands on its own socket", async () => {
  using listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  const before = openDescriptors();
  const open: Pair[] = [];
  const random = new Random(7);
  for (let round = 0; round < 400; round++) {
    if (open.length > 100 || (open.length > 0 && random.below(3) === 0)) {
      open.splice(random.below(open.length), 1)[0][Symbol.dispose]();
    } else open.push(await Pair.open(listener));
  }
  const marks = open.map((_, at) => at % 64 << 2);
  open.forEach(({ client }, at) => setTos(client, marks[at]));
  assert.deepEqual(open.map(({ client }) => getTos(client)), marks);
  assert.deepEqual(open.map(({ server }) => getTos(server)), marks.map(() => 0));
  for (const { client } of open) {
    assert.equal(
      inodeOf(fdOf(client)),
      inodeByPorts(portOf(client.localAddr), portOf(client.remoteAddr)),
    );
  }
  open.forEach((pair) => pair[Symbol.dispose]());
  assert.equal(openDescriptors(), before);
});

Deno.test("while other tasks open and close connections, each mark lands on its own, as the server sees it", async () => {
  using listener = Deno.listen({ hostname: "::1", port: 0 });
  keepArrivals(listener);
  const seen = new Map<number, number | null>(), marks = new Map<number, number>();
  const serving: Promise<void>[] = [];
  const serve = async (conn: Deno.TcpConn) => {
    using _ = conn;
    const byte = new Uint8Array(1);
    // On IPv6 the kernel tells the byte of the latest packet, which brought this.
    await conn.read(byte);
    seen.set(portOf(conn.remoteAddr), readArrived(conn).data);
    await conn.write(byte);
    await conn.read(byte);
  };
  const accepting = (async () => {
    for await (const conn of listener) serving.push(serve(conn));
  })();
  const random = new Random(11);
  const pause = async () => {
    for (let turns = random.below(4); turns > 0; turns--) {
      await new Promise((resolve) => setImmediate(resolve));
    }
  };
  const task = async () => {
    for (let round = 0; round < 10; round++) {
      using conn = await Deno.connect({ hostname: "::1", port: listener.addr.port });
      await pause();
      const tos = random.below(3) === 0 ? 0 : random.below(64) << 2;
      if (tos !== 0) setTos(conn, tos);
      marks.set(portOf(conn.localAddr), tos);
      await pause();
      await conn.write(new Uint8Array(1));
      await conn.read(new Uint8Array(1));
      await pause();
    }
  };
  await Promise.all(Array.from({ length: 20 }, task));
  listener.close();
  await accepting;
  await Promise.all(serving);
  assert.equal(marks.size, 200);
  assert.deepEqual(new Map([...seen].sort()), new Map([...marks].sort()));
});

Deno.test("a descriptor that was closed and given to another connection is noticed", async () => {
  using listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  const first = await Pair.open(listener);
  const fd = fdOf(first.client);
  first[Symbol.dispose]();
  using second = await Pair.open(listener);
  const reused = [second.client, second.server].map((conn: Connection) => fdOf(conn));
  assert.ok(reused.includes(fd), "the kernel hands the same number out again");
  assert.throws(() => setTos(first.client, 0xb8), DescriptorError);
  assert.deepEqual([getTos(second.client), getTos(second.server)], [0, 0]);
});

Deno.test("a connection that the other end has reset keeps its descriptor, or the error says that it is lost", async () => {
  using listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  using known = await Pair.open(listener);
  using unknown = await Pair.open(listener);
  const fd = fdOf(known.client);
  for (const { client, server } of [known, unknown]) {
    await client.write(new Uint8Array(1));
    // With a byte unread, the kernel answers the next one with a reset.
    server.close();
    await client.write(new Uint8Array(1)).catch(() => {});
    await assert.rejects(client.write(new Uint8Array(1)));
  }
  assert.equal(fdOf(known.client), fd);
  assert.throws(
    () => fdOf(unknown.client),
    (error) => error instanceof DescriptorError && error.lost,
  );
});

Deno.test("bytes that TCP cannot carry are refused before any system call", async () => {
  using listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  using pair = await Pair.open(listener);
  for (const tos of [-1, 256, 1.5, NaN, 0xb9, 0x12]) {
    assert.throws(() => setTos(pair.client, tos), RangeError);
  }
  assert.equal(getTos(pair.client), 0);
});

Deno.test("a listener passes its mark to what it accepts", async () => {
  using listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  setTos(listener, 0x20);
  using pair = await Pair.open(listener);
  assert.deepEqual([getTos(pair.server), getTos(pair.client)], [0x20, 0]);
});

testWith(
  ["root", "ip", "tcpdump", "python3"],
  "of two connections with the same ends on two links, neither is taken for the other",
  async () => {
    await using links = await TwinLinks.create();
    await using _server = await FarEnd.start("[::]:8080", links.server.under);
    await using first = await Capture.start(8080, "c0", links.client.under);
    await using second = await Capture.start(8080, "c1", links.client.under);
    // The first has its whole request out only after the second has its answer.
    const clients = `import socket
def connect(device, tos):
    s = socket.socket(socket.AF_INET6)
    scope = socket.if_nametoindex(device)
    s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_TCLASS, tos)
    s.bind(("fe80::2", 5555, 0, scope))
    s.connect(("fe80::1", 8080, 0, scope))
    return s
def body(s):
    text = b"".join(iter(lambda: s.recv(4096), b""))
    return text.split(b"\\r\\n\\r\\n")[1].decode()
one = connect("c0", 0xB8)
one.sendall(b"GET / HTTP/1.1\\r\\n")
two = connect("c1", 0x28)
two.sendall(b"GET / HTTP/1.1\\r\\n\\r\\n")
print(body(two), end="")
one.sendall(b"\\r\\n")
print(body(one), end="")`;
    const words = [...links.client.under, "python3", "-c", clients];
    const { stdout, stderr } = await execute(words);
    const peer = { address: "fe80::2", port: 5555 };
    assert.deepEqual(
      stdout.split("\n").slice(0, 2).map((line) => {
        const { sequence, ...rest } = JSON.parse(line);
        return { ...rest, hasSequence: sequence !== null };
      }),
      [
        { peer, syn: null, ack: null, data: null, hasSequence: false },
        { peer, syn: 0xb8, ack: null, data: 0xb8, hasSequence: true },
      ],
      stderr,
    );
    for (const [capture, tos] of [[first, 0xb8], [second, 0]] as const) {
      const answer = (await capture.connection()).find(({ from, length }) =>
        from === 8080 && length > 0
      );
      assert.equal(answer?.tos, tos);
    }
  },
);

Deno.test("a listener is not taken for a connection to its port that was closed or reset", async () => {
  using listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  using pair = await Pair.open(listener);
  pair.server.close();
  pair.client.close();
  assert.throws(
    () => fdOf(pair.server),
    (error) => error instanceof DescriptorError && !error.lost,
  );
});

Deno.test("the byte of a SYN is reported as often as it is asked for", async () => {
  using listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  keepArrivals(listener);
  const dialed = await dial({ hostname: "127.0.0.1", port: listener.addr.port, tos: 0xb8 });
  await dialed.write(new Uint8Array(1));
  using server = await listener.accept();
  const first = readArrived(server);
  assert.deepEqual([first.syn, first.ack, first.data], [0xb8, null, 0xb8]);
  assert.deepEqual(readArrived(server), first);
  dialed.close();
});

Deno.test("a socket is ours until its descriptor is closed or has gone to another socket", async () => {
  using listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  const pair = await Pair.open(listener);
  const socket = socketOf(pair.client);
  assert.equal(socketOf(pair.client), socket, "it is searched for once");
  assert.ok(socket.isOurs);
  pair[Symbol.dispose]();
  assert.ok(!socket.isOurs);
  using next = await Pair.open(listener);
  const descriptors = [next.client, next.server].map((conn) => fdOf(conn));
  assert.ok(descriptors.includes(socket.fd), "the kernel hands the same number out again");
  assert.ok(!socket.isOurs);
});

Deno.test("what is known of a connection stays as it is when others are searched for", async () => {
  using listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  using one = await Pair.open(listener);
  using two = await Pair.open(listener);
  const socket = socketOf(one.client);
  findConnection(two.client);
  findConnection(two.server);
  assert.deepEqual(socket.local, encode(one.client.localAddr as Deno.NetAddr, 0, bytes()));
  assert.deepEqual(socket.remote, encode(one.client.remoteAddr as Deno.NetAddr, 0, bytes()));

  function bytes(): Uint8Array<ArrayBuffer> {
    return new Uint8Array(SOCKADDR_SIZE).fill(0xff);
  }
});
