import assert from "node:assert/strict";
import { DescriptorError, getTos, setTos } from "../ffi/mod.ts";
import { Namespace } from "./support/namespaces.ts";
import { Capture, type Seen } from "./support/packets.ts";
import { testWith } from "./support/processes.ts";
import { Certificates, send } from "./support/servers.ts";

const NEEDS = ["root", "tcpdump"];
const QUIET = { port: 0, onListen() {} };
const GET = "GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";

const MARKS = "setTos marks a Deno.serve server, SYN-ACK included";

/** A Deno.serve server for https; gone when disposed of. */
class Secure implements AsyncDisposable {
  private constructor(
    readonly server: Deno.HttpServer<Deno.NetAddr>,
    readonly caCerts: string[],
  ) {}

  static async start(): Promise<Secure> {
    await using certificates = await Certificates.create();
    const { certificate, key, root } = certificates;
    const texts = [certificate, key, root].map((file) => Deno.readTextFileSync(file));
    const how = { ...QUIET, hostname: "127.0.0.1", cert: texts[0], key: texts[1] };
    return new Secure(Deno.serve(how, () => new Response("hello")), [texts[2]]);
  }

  get port(): number {
    return this.server.addr.port;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.server.shutdown();
  }
}

/** Asks on a connection and reads to its end. */
async function ask(conn: Deno.Conn): Promise<string> {
  using open = conn;
  await send(open, GET);
  return await new Response(open.readable).text();
}

/** The bytes of what a port sent: its handshake, and the rest but for resets. */
function sentBy(
  port: number,
  packets: readonly Seen[],
): { handshake: number[]; data: number[]; rest: Set<number> } {
  // A reset is not the socket's: it carries the byte of the packet that it answers.
  const sent = packets.filter(({ from, flags }) => from === port && !flags.includes("R"));
  const [handshake, rest] = [true, false].map((isSyn) =>
    sent.filter(({ flags }) => flags.includes("S") === isSyn)
  );
  const bytes = (packets: readonly Seen[]) => packets.map(({ tos }) => tos);
  return {
    handshake: bytes(handshake),
    data: bytes(rest.filter(({ length }) => length > 0)),
    rest: new Set(bytes(rest)),
  };
}

/** Every packet from the port carries EF, the SYN-ACK too; none of the client's does. */
function assertServerMarked(packets: readonly Seen[], port: number): void {
  const { handshake, data, rest } = sentBy(port, packets);
  assert.deepEqual([handshake, [...rest]], [[0xb8], [0xb8]]);
  assert.ok(data.length > 0);
  const client = packets.filter(({ to }) => to === port).map(({ tos }) => tos);
  assert.deepEqual(new Set(client), new Set([0]));
}

for (
  const [name, hostname, asked] of [
    ["IPv4", "127.0.0.1", "127.0.0.1"],
    ["IPv6", "::1", "::1"],
    ["IPv4 on a dual-stack socket", "::", "127.0.0.1"],
    ["IPv6 on a dual-stack socket", "::", "::1"],
  ]
) {
  testWith(NEEDS, `${MARKS}: ${name}`, async () => {
    await using server = Deno.serve({ ...QUIET, hostname }, () => new Response("hello"));
    const { port } = server.addr;
    assert.equal(setTos(server, 0xb8), 0xb8);
    await using capture = await Capture.start(port);
    assert.match(await ask(await Deno.connect({ hostname: asked, port })), /\r\n\r\nhello$/);
    assertServerMarked(await capture.connection(), port);
  });
}

testWith([...NEEDS, "openssl"], `${MARKS}: TLS`, async () => {
  await using secure = await Secure.start();
  const { port, caCerts } = secure;
  setTos(secure.server, 0xb8);
  await using capture = await Capture.start(port);
  const conn = await Deno.connectTls({ hostname: "127.0.0.1", port, caCerts });
  assert.match(await ask(conn), /\r\n\r\nhello$/);
  assertServerMarked(await capture.connection(), port);
});

testWith(NEEDS, `${MARKS}: WebSocket`, async () => {
  await using server = Deno.serve({ ...QUIET, hostname: "127.0.0.1" }, (request) => {
    const { socket, response } = Deno.upgradeWebSocket(request);
    socket.onmessage = ({ data }) => socket.send(data);
    return response;
  });
  const { port } = server.addr;
  setTos(server, 0xb8);
  await using capture = await Capture.start(port);
  const socket = new WebSocket(`ws://127.0.0.1:${port}/`);
  const closed = new Promise((resolve) => socket.onclose = resolve);
  socket.onopen = () => socket.send("x".repeat(1000));
  const echoed = await new Promise((resolve) => socket.onmessage = ({ data }) => resolve(data));
  assert.equal(echoed, "x".repeat(1000));
  socket.close();
  await closed;
  const packets = await capture.connection();
  assertServerMarked(packets, port);
  const messages = packets.filter(({ from, length }) => from === port && length > 1000);
  assert.deepEqual(messages.map(({ tos }) => tos), [0xb8]);
});

testWith(NEEDS, "a handler of Deno.serve marks its own connection", async () => {
  await using server = Deno.serve({ ...QUIET, hostname: "127.0.0.1" }, (_, { remoteAddr }) => {
    setTos({ localAddr: server.addr, remoteAddr }, 0x88);
    return new Response("hello");
  });
  const { port } = server.addr;
  await using capture = await Capture.start(port);
  await ask(await Deno.connect({ hostname: "127.0.0.1", port }));
  const { handshake, data } = sentBy(port, await capture.connection());
  assert.deepEqual([handshake, [...new Set(data)]], [[0], [0x88]]);
});

testWith(NEEDS, "setTos marks an accepted connection, from then on", async () => {
  using listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  const { port } = listener.addr;
  await using capture = await Capture.start(port);
  const client = await Deno.connect({ hostname: "127.0.0.1", port });
  using conn = await listener.accept();
  setTos(conn, 0xb8);
  await send(conn, "hello");
  await conn.closeWrite();
  assert.equal(await new Response(client.readable).text(), "hello");
  const { handshake, rest } = sentBy(port, await capture.connection());
  assert.deepEqual([handshake, [...rest]], [[0], [0xb8]]);
});

for (const how of ["Deno.connectTls", "Deno.startTls"]) {
  const covered = how === "Deno.startTls" ? ", ClientHello included" : ", the request included";

  testWith([...NEEDS, "openssl"], `setTos marks a connection of ${how}${covered}`, async () => {
    await using secure = await Secure.start();
    const { port, caCerts } = secure;
    await using capture = await Capture.start(port);
    const to = { hostname: "127.0.0.1", port };
    let conn: Deno.TlsConn;
    if (how === "Deno.connectTls") {
      conn = await Deno.connectTls({ ...to, caCerts });
      setTos(conn, 0xb8);
    } else {
      const plain = await Deno.connect(to);
      setTos(plain, 0xb8);
      conn = await Deno.startTls(plain, { hostname: "127.0.0.1", caCerts });
    }
    await ask(conn);
    const sent = (await capture.connection()).filter((packet) => packet.to === port);
    const [hello, ...others] = sent.filter(({ length }) => length > 0);
    assert.ok(others.length > 0, "the request comes after the ClientHello");
    assert.deepEqual(new Set(others.map(({ tos }) => tos)), new Set([0xb8]));
    // Deno.connectTls sends it on another thread, before setTos or after.
    if (how === "Deno.startTls") assert.equal(hello.tos, 0xb8);
  });
}

Deno.test("a connection that was accepted before its server is marked keeps its byte", async () => {
  using listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  const how = { hostname: "127.0.0.1", port: listener.addr.port };
  using _early = await Deno.connect(how);
  using before = await listener.accept();
  setTos(listener, 0xb8);
  using _late = await Deno.connect(how);
  using after = await listener.accept();
  assert.deepEqual([getTos(before), getTos(after)], [0, 0xb8]);
});

Deno.test("of servers that share a port, none is marked by guess", async () => {
  const how = { ...QUIET, hostname: "127.0.0.1", reusePort: true };
  await using one = Deno.serve(how, () => new Response());
  assert.equal(setTos(one, 0xb8), 0xb8);
  await using two = Deno.serve({ ...how, port: one.addr.port }, () => new Response());
  for (const server of [one, two]) {
    assert.throws(() => setTos(server, 0x88), DescriptorError);
  }
});

Deno.test("a server on a Unix socket, or one that was shut down, cannot be marked", async () => {
  const folder = await Deno.makeTempDir({ prefix: "dscp-get-" });
  const unix = Deno.serve({ path: `${folder}/socket`, onListen() {} }, () => new Response());
  assert.throws(() => setTos(unix, 0xb8), TypeError);
  await unix.shutdown();
  await Deno.remove(folder, { recursive: true });
  const server = Deno.serve({ ...QUIET, hostname: "127.0.0.1" }, () => new Response());
  await server.shutdown();
  assert.throws(() => setTos(server, 0xb8), DescriptorError);
});

testWith(
  ["root", "ip", "sysctl"],
  "on a host that returns each client's own byte, marking a listener is an error and no promise",
  async () => {
    const mod = new URL("../ffi/mod.ts", import.meta.url).href;
    const script = `const { setTos } = await import(${JSON.stringify(mod)});
      const opened = () => [...Deno.readDirSync("/proc/self/fd")].length;
      const server = Deno.serve({ port: 0, onListen() {} }, () => new Response("hello"));
      const first = await Deno.connect(server.addr), before = opened();
      setTos(first, 0x88);
      try {
        console.log(setTos(server, 0xb8));
      } catch (error) {
        console.log(error.message);
      }
      console.log(opened() - before);
      Deno.exit();`;
    await using namespace = await Namespace.create();
    for (
      const [reflects, said] of [
        [0, "184\n0\n"],
        [
          1,
          "connections have the byte of their SYN, not the listener's: " +
          "sysctl net.ipv4.tcp_reflect_tos is 1\n0\n",
        ],
      ] as const
    ) {
      await namespace.run("sysctl", "-qw", `net.ipv4.tcp_reflect_tos=${reflects}`);
      const run = await namespace.run(Deno.execPath(), "eval", script);
      assert.equal(run.stdout, said);
    }
  },
);
