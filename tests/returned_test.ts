import assert from "node:assert/strict";
import { dial, MarkedConn, setTos } from "../ffi/mod.ts";
import { startConnect } from "../ffi/dial.ts";
import { Socket } from "../ffi/fd.ts";
import * as libc from "../ffi/libc.ts";
import { setOption } from "../ffi/calls.ts";
import { openReturned, parseReturned, readReturned } from "../ffi/arrived.ts";
import { AF_INET, AF_INET6, encode } from "../ffi/sockaddr.ts";
import { Capture, fromHex } from "./support/packets.ts";
import { dscpGet, execute, Nobody, openDescriptors, testWith } from "./support/processes.ts";
import { OK, RawServer, readRequest, send } from "./support/servers.ts";

/** A server whose replies have this mark, whatever its handshake has. */
function marking(tos: number, hostname = "127.0.0.1"): RawServer {
  return new RawServer(async (conn, server) => {
    await readRequest(conn, server);
    setTos(conn, tos);
    await send(conn, OK);
  }, hostname);
}

for (const host of ["127.0.0.1", "[::ffff:127.0.0.1]", "[::1]"]) {
  testWith(
    ["root", "tcpdump"],
    `root sees the mark of the reply's packets, tcpdump agrees: ${host}`,
    async () => {
      await using server = marking(0x88, host === "[::1]" ? "::1" : "127.0.0.1");
      for (const how of [[], ["--mark-syn"]]) {
        await using capture = await Capture.start(server.port);
        const url = `http://${host}:${server.port}/`;
        const { code, stdout } = await dscpGet(["--json", ...how, url]);
        assert.deepEqual([code, JSON.parse(stdout).reply.tos], [0, 0x88]);
        const data = (await capture.connection()).filter(({ from, length }) =>
          from === server.port && length > 0
        );
        assert.deepEqual(data.map(({ tos }) => tos), data.map(() => 0x88));
      }
    },
  );
}

testWith(["root", "setpriv"], "on IPv4 nobody else sees it, which is no failure", async () => {
  await using nobody = await Nobody.create();
  await using server = marking(0x88);
  const { code, stdout, stderr } = await execute([...nobody.command, "--json", server.url]);
  assert.equal(code, 0, stderr);
  const { reply, sent } = JSON.parse(stdout);
  assert.deepEqual([reply.tos, sent.proved], [undefined, true]);
});

testWith(
  ["root"],
  "of packets between the same addresses only those of the connection count, and the latest of them",
  async () => {
    using listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
    const { hostname, port } = listener.addr;
    const open = async (isDialed: boolean) => {
      const to = { hostname, port };
      const [stream, server] = await Promise.all([
        isDialed ? dial({ ...to, tos: null }) : Deno.connect(to),
        listener.accept(),
      ]);
      server.setNoDelay(true);
      const conn = MarkedConn.adopt(stream);
      await conn.write(new Uint8Array(1));
      return { conn, server };
    };
    /** Sends bytes with a mark from the server, and receives them. */
    const reply = async ({ conn, server }: Awaited<ReturnType<typeof open>>, tos: number) => {
      setTos(server, tos);
      await server.write(new Uint8Array(10));
      await conn.read(new Uint8Array(10));
    };
    const before = openDescriptors();
    for (const isDialed of [false, true]) {
      const [one, other, silent] = [
        await open(isDialed),
        await open(isDialed),
        await open(isDialed),
      ];
      await reply(one, 0x20);
      // More than a queue holds.
      for (let count = 0; count < 1000; count++) await reply(other, 0x88);
      await reply(one, 0x28);
      // Closing sends a packet without data and another mark.
      setTos(one.server, 0xe0);
      await one.server.closeWrite();
      assert.equal(await one.conn.read(new Uint8Array(1)), null);
      assert.deepEqual([one.conn.arrivedTos, other.conn.arrivedTos], [0x28, 0x88]);
      assert.deepEqual([one.conn.arrivedTos, silent.conn.arrivedTos], [0x28, null]);
      const unread = await open(isDialed);
      for (const { conn, server } of [one, other, silent, unread]) {
        conn.close();
        server.close();
      }
    }
    // What waits for dialed sockets stays open.
    assert.ok(openDescriptors() <= before + 2);
  },
);

testWith(
  ["root"],
  "a connection with the same ports and another address is another one",
  async () => {
    using listener = Deno.listen({ hostname: "0.0.0.0", port: 0 });
    const { port } = listener.addr;
    let ownPort = 0;
    const open = async (from: string, to: string) => {
      const fd = libc.socket(AF_INET);
      setOption(fd, libc.SO_REUSEADDR, 1);
      const local = encode({ transport: "tcp", hostname: from, port: ownPort });
      const remote = encode({ transport: "tcp", hostname: to, port });
      assert.equal(libc.bind(fd, local), 0);
      libc.getsockname(fd, local);
      ownPort = local[2] << 8 | local[3];
      assert.equal(startConnect(fd, remote), -libc.EINPROGRESS);
      return { socket: new Socket(fd, AF_INET, local, remote), server: await listener.accept() };
    };
    // Not the address that the kernel would choose.
    const ours = await open("127.0.0.5", "127.0.0.1");
    const others = [await open("127.0.0.5", "127.0.0.3"), await open("127.0.0.4", "127.0.0.1")];
    const raw = openReturned(ours.socket)!;
    for (const { server } of others) {
      setTos(server, 0x88);
      await server.write(new Uint8Array(1));
    }
    assert.equal(readReturned(raw, ours.socket), null);
    setTos(ours.server, 0x20);
    await ours.server.write(new Uint8Array(1));
    assert.equal(readReturned(raw, ours.socket), 0x20);
    const ends = [40000, 80].map((port) => encode({ transport: "tcp", hostname: "::1", port }));
    assert.equal(openReturned(new Socket(raw, AF_INET6, ends[0], ends[1])), null);
    for (const { socket, server } of [ours, ...others]) {
      libc.close(socket.fd);
      server.close();
    }
    libc.close(raw);
  },
);

Deno.test("a packet's byte is read if it has data for the connection's ports", () => {
  const local = encode({ transport: "tcp", hostname: "192.0.2.1", port: 0x1234 });
  const remote = encode({ transport: "tcp", hostname: "198.51.100.2", port: 0x5678 });
  const ip = (length: string, first = "45") =>
    `${first}88 ${length} 0000 4000 4006 0000 c6336402 c0000201`;
  const tcp = (ports: string, offset = "50") =>
    `${ports} 00000001 00000001 ${offset}18 0000 0000 0000`;
  for (
    const [what, packet, tos] of [
      ["data", ip("0029") + tcp("5678 1234"), 0x88],
      ["much of it", ip("ffff") + tcp("5678 1234"), 0x88],
      ["none", ip("0028") + tcp("5678 1234"), null],
      ["options of IP", `${ip("002d", "46")} 01010101 ${tcp("5678 1234")}`, 0x88],
      ["and no data", `${ip("002c", "46")} 01010101 ${tcp("5678 1234")}`, null],
      ["options of TCP", `${ip("0035")} ${tcp("5678 1234", "80")}`, 0x88],
      ["and no data", `${ip("0034")} ${tcp("5678 1234", "80")}`, null],
      ["our own packet", ip("0029") + tcp("1234 5678"), null],
      ["another source", ip("0029") + tcp("5679 1234"), null],
      ["another source", ip("0029") + tcp("5778 1234"), null],
      ["another destination", ip("0029") + tcp("5678 1235"), null],
      ["another destination", ip("0029") + tcp("5678 1334"), null],
      ["cut short", ip("0029"), null],
      ["cut behind the ports", ip("0018") + "5678 1234", null],
      ["less than a header of TCP", ip("0029") + tcp("5678 1234", "40"), null],
      ["nothing", "", null],
    ] as const
  ) assert.equal(parseReturned(fromHex(packet), local, remote), tos, what);
});
