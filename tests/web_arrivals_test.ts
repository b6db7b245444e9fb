import assert from "node:assert/strict";
import { parseSequence } from "../ffi/arrived.ts";
import { IP_RECVTOS, TCP_DEFER_ACCEPT } from "../ffi/libc.ts";
import {
  arrivedFrom,
  DescriptorError,
  dial,
  drainSent,
  fdOf,
  keepArrivals,
  readArrived,
  setTos,
  watchSent,
} from "../ffi/mod.ts";
import { getOption, setOption } from "../ffi/calls.ts";
import { Capture, fromHex } from "./support/packets.ts";
import { execute, testWith } from "./support/processes.ts";
import { send } from "./support/servers.ts";
import { until } from "./support/waiting.ts";

const QUIET = { port: 0, onListen() {} };
const GET = "GET / HTTP/1.1\r\nHost: localhost\r\n\r\n";

/** A Deno.serve server that answers with what arrived, and marks its reply as the request was. */
function reporting(hostname: string): Deno.HttpServer<Deno.NetAddr> {
  const server = Deno.serve({ ...QUIET, hostname }, (_, { remoteAddr }) => {
    const { setTos, ...arrived } = arrivedFrom(server, remoteAddr);
    setTos(arrived.data!);
    return Response.json({ ...arrived, from: remoteAddr.hostname });
  });
  keepArrivals(server);
  return server;
}

/** Sends a request and reads the reply, whose connection stays open. */
async function ask(conn: Deno.Conn): Promise<ReturnType<typeof JSON.parse>> {
  await send(conn, GET);
  const buffer = new Uint8Array(4096);
  let text = "";
  while (!text.includes("}")) {
    const size = await conn.read(buffer);
    assert.ok(size !== null, text);
    text += new TextDecoder().decode(buffer.subarray(0, size));
  }
  return JSON.parse(text.slice(text.indexOf("{")));
}

for (
  const [name, hostname, asked] of [
    ["IPv4", "127.0.0.1", "127.0.0.1"],
    ["IPv4 at any address", "0.0.0.0", "127.0.0.1"],
    ["IPv6", "::1", "::1"],
    ["IPv4 on a dual-stack socket", "::", "127.0.0.1"],
    ["IPv6 on a dual-stack socket", "::", "::1"],
  ]
) {
  testWith(
    ["root", "tcpdump"],
    `a handler of Deno.serve learns what arrived, and marks its reply: ${name}`,
    async () => {
      await using server = reporting(hostname);
      const { port } = server.addr;
      await using capture = await Capture.start(port);
      {
        using conn = await Deno.connect({ hostname: asked, port });
        watchSent(conn);
        setTos(conn, 0xb8);
        const { syn, ack, data, sequence } = await ask(conn);
        assert.deepEqual([syn, ack, data], [0, null, 0xb8]);
        assert.equal(sequence, (drainSent(conn)[0].sequence - 1) >>> 0);
        // On the same connection: the SYN is remembered, and IPv4 knows the first packet alone.
        setTos(conn, 0x88);
        const second = await ask(conn);
        assert.deepEqual([second.syn, second.ack, second.sequence], [0, null, sequence]);
        assert.equal(second.data, asked === "::1" ? 0x88 : 0xb8);
      }
      const packets = await capture.connection();
      const replies = packets.filter(({ from, length }) => from === port && length > 0);
      const marks = new Set(replies.map(({ tos }) => tos));
      assert.deepEqual(marks, new Set(asked === "::1" ? [0xb8, 0x88] : [0xb8]));
    },
  );
}

Deno.test("connections of one server are told apart, and one that is closed has no arrivals", async () => {
  let remoteAddr: Deno.NetAddr | undefined, own: ReturnType<typeof arrivedFrom> | undefined;
  await using server = Deno.serve({ ...QUIET, hostname: "127.0.0.1" }, (_, info) => {
    remoteAddr = info.remoteAddr;
    own = arrivedFrom(server, remoteAddr);
    return Response.json({ data: own.data });
  });
  keepArrivals(server);
  const { port } = server.addr, conns: Deno.Conn[] = [];
  for (const tos of [0xb8, 0x88, 0x20]) {
    const conn = await Deno.connect({ port });
    setTos(conn, tos);
    assert.equal((await ask(conn)).data, tos);
    conns.push(conn);
  }
  for (const conn of conns) conn.close();
  await until(() => {
    try {
      return arrivedFrom(server, remoteAddr!) && false;
    } catch (error) {
      return error instanceof DescriptorError;
    }
  }, "the last connection to be closed");
  assert.throws(() => own!.setTos(0), DescriptorError);
  const elsewhere = { ...remoteAddr!, port: 1 };
  assert.throws(() => arrivedFrom(server, elsewhere), /no open descriptor connects 127\.0\.0\.1:/);
});

const FROM_ONE_PORT = `import socket, sys
conns = []
for at, where in enumerate(sys.argv[1:]):
    conn = socket.socket()
    conn.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    conn.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, 0x20 + 0x20 * at)
    conn.bind(("127.0.0.1", conns[0].getsockname()[1] if conns else 0))
    host, port = where.split(":")
    conn.connect((host, int(port)))
    conns.append(conn)
for conn in conns: conn.sendall(b"GET / HTTP/1.1\\r\\nHost: a\\r\\nConnection: close\\r\\n\\r\\n")
for conn in conns: print(conn.makefile().read().split("\\n")[-1])
`;

testWith(
  ["python3"],
  "one client port at two servers is two connections; at two addresses of one server it is refused",
  async () => {
    let waiting = 0, gate = Promise.withResolvers<void>();
    const serve = (hostname: string, port = 0) => {
      const how = { hostname, port, onListen() {} };
      const server: Deno.HttpServer<Deno.NetAddr> = Deno.serve(how, async (_, { remoteAddr }) => {
        // Both connections are to be here.
        const { promise } = gate;
        if (++waiting % 2 === 0) {
          gate.resolve();
          gate = Promise.withResolvers();
        }
        await promise;
        try {
          return new Response(String(arrivedFrom(server, remoteAddr).data));
        } catch (error) {
          return new Response((error as Error).name);
        }
      });
      keepArrivals(server);
      return server;
    };
    const ask = async (...where: string[]) => {
      const { stdout, stderr } = await execute(["python3", "-c", FROM_ONE_PORT, ...where]);
      return stdout.trim().split("\n").concat(stderr === "" ? [] : stderr);
    };
    await using one = serve("127.0.0.1");
    await using two = serve("127.0.0.1");
    await using other = serve("127.0.0.2", one.addr.port);
    const at = (server: Deno.HttpServer<Deno.NetAddr>, host = server.addr.hostname) =>
      `${host}:${server.addr.port}`;
    assert.deepEqual(await ask(at(one), at(two)), ["32", "64"]);
    assert.deepEqual(await ask(at(one), at(other)), ["32", "64"]);
    await using any = serve("0.0.0.0");
    assert.deepEqual(await ask(at(any, "127.0.0.1"), at(two)), ["32", "64"]);
    const both = await ask(at(any, "127.0.0.1"), at(any, "127.0.0.2"));
    assert.deepEqual(both, ["DescriptorError", "DescriptorError"]);
  },
);

Deno.test("servers that share a port, and Unix sockets, are refused", async () => {
  const how = { ...QUIET, hostname: "127.0.0.1", reusePort: true };
  await using one = Deno.serve(how, () => new Response());
  await using _two = Deno.serve({ ...how, port: one.addr.port }, () => new Response());
  assert.throws(() => keepArrivals(one), DescriptorError);
  const folder = await Deno.makeTempDir({ prefix: "dscp-get-" });
  const unix = Deno.serve({ path: `${folder}/socket`, onListen() {} }, (_, { remoteAddr }) => {
    assert.throws(() => arrivedFrom(unix, remoteAddr), TypeError);
    return new Response();
  });
  assert.throws(() => keepArrivals(unix), TypeError);
  const client = await Deno.connect({ transport: "unix", path: `${folder}/socket` });
  await send(client, GET.replace("\r\n\r\n", "\r\nConnection: close\r\n\r\n"));
  assert.match(await new Response(client.readable).text(), /^HTTP\/1\.1 200 /);
  await unix.shutdown();
  await Deno.remove(folder, { recursive: true });
});

Deno.test("a client that is silent is accepted in the end, and then its request's byte is unknown", async () => {
  using listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  keepArrivals(listener);
  assert.equal(getOption(fdOf(listener), TCP_DEFER_ACCEPT), 3);
  using client = await Deno.connect({ port: listener.addr.port });
  setTos(client, 0xb8);
  using conn = await listener.accept();
  await send(client, "hello");
  await conn.read(new Uint8Array(9));
  const { syn, ack, data, sequence } = readArrived(conn);
  assert.deepEqual([syn, data, typeof sequence], [0, null, "number"]);
  // The ACK of the SYN-ACK that was sent again has the mark already.
  assert.equal(ack, 0xb8);
});

Deno.test("what was sent again after the first look does not make the request's byte unknown", async () => {
  using listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  keepArrivals(listener);
  using client = await Deno.connect({ port: listener.addr.port });
  setTos(client, 0x88);
  await send(client, "hello");
  using conn = await listener.accept();
  const first = readArrived(conn);
  assert.deepEqual([first.syn, first.ack, first.data], [0, null, 0x88]);
  assert.deepEqual(readArrived(conn), first);
  const { localAddr, remoteAddr } = conn;
  assert.deepEqual(readArrived({ localAddr, remoteAddr }), first, "however it is found");
  const { setTos: _, ...found } = arrivedFrom(listener, remoteAddr);
  assert.deepEqual(found, first);
});

Deno.test("without a saved SYN nothing shows which packet's byte IPv4 reports", async () => {
  using listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  const unknown = { syn: null, ack: null, data: null, sequence: null };
  for (const expected of [unknown, { ...unknown, ack: 0x88 }]) {
    const client = await dial({ hostname: "127.0.0.1", port: listener.addr.port, tos: 0x88 });
    await client.write(new Uint8Array(1));
    using conn = await listener.accept();
    assert.deepEqual(readArrived(conn), expected);
    client.close();
    setOption(fdOf(listener), IP_RECVTOS, 1);
  }
});

Deno.test("the sequence number is read from behind the IP header, and from a whole TCP header only", () => {
  const ipv4 = (words: number, protocol = "06") =>
    `4${words}00 0000 0000 0000 40${protocol} 0000` + "7f000001".repeat(words - 3);
  const ipv6 = (next = "06") => `6b80 0000 0014 ${next}40` + "00".repeat(32);
  const tcp = "0001 0002 fedcba98 00000000 5002 0000 0000 0000";
  for (
    const [headers, sequence] of [
      [ipv4(5) + tcp, 0xfedcba98],
      [ipv4(6) + tcp, 0xfedcba98],
      [ipv6() + tcp, 0xfedcba98],
      [`${ipv4(5)}${tcp}00`, 0xfedcba98],
      [(ipv4(5) + tcp).slice(0, -2), null],
      [(ipv6() + tcp).slice(0, -2), null],
      [ipv4(5), null],
      [ipv4(5, "11") + tcp, null],
      [ipv6("00") + tcp, null],
      ["", null],
    ] as const
  ) {
    assert.equal(parseSequence(fromHex(headers)), sequence, headers);
    const shifted = fromHex(`ffff${headers}`).subarray(2);
    assert.equal(parseSequence(shifted), sequence, "not at the start of its buffer");
  }
});
