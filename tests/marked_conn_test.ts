import assert from "node:assert/strict";
import {
  type ConnectOptions,
  DescriptorError,
  dial,
  type DialedConn,
  getTos,
  MarkedConn,
} from "../ffi/mod.ts";
import { needsOwnSocket } from "../ffi/conn.ts";
import { pause } from "../ffi/deno.ts";
import { openDescriptors } from "./support/processes.ts";
import { RawServer, reset } from "./support/servers.ts";
import { Exit, Failure, get } from "../main.ts";

const OPTIONS: ConnectOptions = {
  hostname: "127.0.0.1",
  port: 80,
  markSyn: false,
  family: null,
  trust: null,
  requestSize: 100,
};

for (const [how, isDialed] of [["Deno.connect", false], ["dial", true]] as const) {
  /** A connection of one kind, not marked, and the server's end of it. */
  const open = async (listener: Deno.TcpListener) => {
    const { hostname, port } = listener.addr, to = { hostname, port };
    const connecting: Promise<DialedConn | Deno.TcpConn> = isDialed
      ? dial({ ...to, tos: null })
      : Deno.connect(to);
    const [stream, server] = await Promise.all([connecting, listener.accept()]);
    return { stream, server };
  };

  Deno.test(`adopting a connection finds its descriptor, and setTos marks it: ${how}`, async () => {
    using listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
    const { stream, server } = await open(listener);
    const conn = MarkedConn.adopt(stream);
    assert.match(Deno.readLinkSync(`/proc/self/fd/${conn.fd}`), /^socket:/);
    assert.deepEqual([getTos(conn), conn.readBack, conn.sent], [0, null, []]);
    conn.setTos(0xb8);
    assert.deepEqual([getTos(conn), conn.readBack], [0xb8, 0xb8]);
    assert.throws(() => conn.setTos(3), RangeError);
    await conn.write(new Uint8Array(10));
    await server.read(new Uint8Array(10));
    assert.deepEqual(conn.sent.map(({ tos, payload }) => [tos, payload]), [[0xb8, 10]]);
    conn.close();
    server.close();
    assert.throws(() => getTos(conn), DescriptorError);
    assert.deepEqual([conn.arrivedTos, conn.sent.length], [null, 1]);
  });

  Deno.test(`a handshake ends, and leaves no descriptor, when its connection is closed: ${how}`, async () => {
    using listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
    // What loading TLS opens stays open.
    const first = await open(listener);
    first.server.close();
    using opened = MarkedConn.adopt(first.stream);
    await assert.rejects(opened.startTls("localhost", null));
    opened.close();
    const before = openDescriptors(), buffer = new Uint8Array(4096);
    for (const isLater of [false, false, false, true, true, true]) {
      const { stream, server } = await open(listener);
      const conn = MarkedConn.adopt(stream);
      const securing = assert.rejects(conn.startTls("localhost", null));
      // The ClientHello has come: the handshake waits for the server.
      if (isLater) {
        const size = await server.read(buffer);
        assert.deepEqual([conn.sent.map(({ payload }) => payload), conn.dataSent], [[size], size]);
      }
      conn.close();
      const ended = (async () => {
        while (await server.read(buffer).catch(() => null) !== null);
        return "ended";
      })();
      assert.equal(await Promise.race([ended, pause(10_000).then(() => "still open")]), "ended");
      await securing;
      server.close();
    }
    // Deno closes some of its descriptors a few turns of the event loop later.
    for (let turn = 0; openDescriptors() > before && turn < 1000; turn++) {
      await new Promise((resolve) => setImmediate(resolve));
    }
    const after = openDescriptors();
    assert.ok(after <= before, `${after} instead of ${before}`);
  });
}

Deno.test("a connection that was reset before it was adopted is lost, and closed", async () => {
  using listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  const { hostname, port } = listener.addr;
  const before = openDescriptors();
  const [stream, server] = await Promise.all([
    Deno.connect({ hostname, port }),
    listener.accept(),
  ]);
  reset(server);
  await assert.rejects(stream.read(new Uint8Array(1)), Deno.errors.ConnectionReset);
  assert.throws(
    () => MarkedConn.adopt(stream),
    (error) => error instanceof DescriptorError && error.lost,
  );
  server.close();
  assert.equal(openDescriptors(), before);
});

Deno.test("every byte of a large request is seen to leave, though the kernel keeps few copies", async () => {
  using listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  const { hostname, port } = listener.addr;
  // Three packets over loopback, of which the kernel keeps two; it often is in time, so many times.
  const bytes = new Uint8Array(150_000), buffer = new Uint8Array(1 << 20);
  for (let times = 0; times < 40; times++) {
    const [stream, server] = await Promise.all([
      dial({ hostname, port, tos: 0xb8 }),
      listener.accept(),
    ]);
    using conn = MarkedConn.adopt(stream);
    using _ = server;
    const received = (async () => {
      for (let all = 0; all < bytes.length;) all += await server.read(buffer) ?? NaN;
    })();
    await conn.write(bytes);
    await received;
    const seen = conn.sent.reduce((sum, { payload }) => sum + payload, 0);
    assert.deepEqual([seen, conn.dataSent], [bytes.length, bytes.length]);
  }
});

Deno.test("a closed connection reports nothing of the one that has its descriptor now", async () => {
  using listener = Deno.listen({ hostname: "::1", port: 0 });
  const { hostname, port } = listener.addr;
  const open = async () => {
    const dialing = dial({ hostname, port, tos: 0xb8 });
    const [stream, server] = await Promise.all([dialing, listener.accept()]);
    const conn = MarkedConn.adopt(stream);
    await conn.write(new Uint8Array(1));
    await server.write(new Uint8Array(1));
    await conn.read(new Uint8Array(1));
    return { conn, server };
  };
  const first = await open();
  assert.equal(first.conn.arrivedTos, 0);
  first.conn.close();
  const second = await open();
  assert.equal(second.conn.fd, first.conn.fd, "the kernel hands the same number out again");
  assert.deepEqual([second.conn.arrivedTos, first.conn.arrivedTos], [0, null]);
  assert.deepEqual([first.conn.sent.length, second.conn.sent.length], [1, 1]);
  for (const each of [first.server, second.conn, second.server]) each.close();
});

Deno.test("Deno's own TLS is refused roots that it cannot be given", async () => {
  using listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  const { hostname, port } = listener.addr;
  const stream = await Deno.connect({ hostname, port });
  using conn = MarkedConn.adopt(stream);
  await assert.rejects(conn.startTls("localhost", { caCerts: [], insecure: true }), TypeError);
});

Deno.test("a connection takes a socket of its own only for what Deno's cannot do", () => {
  // 1280 bytes, less IPv6's 40, TCP's 32 with timestamps, and 29 of a TLS record
  const most = 1280 - 40 - 32 - 29;
  for (
    const [options, expected] of [
      [{}, false],
      [{ requestSize: most }, false],
      [{ requestSize: most + 1 }, true],
      [{ markSyn: true }, true],
      [{ family: 4 }, true],
      [{ family: 6 }, true],
      [{ trust: { caCerts: [], insecure: true } }, true],
      [{ hostname: "localhost" }, false],
      [{ hostname: "a.localhost" }, true],
      [{ hostname: "A.B.LOCALHOST." }, true],
      [{ hostname: "localhost.example" }, false],
      [{ hostname: "alocalhost" }, false],
    ] as const
  ) assert.equal(needsOwnSocket({ ...OPTIONS, ...options }), expected, JSON.stringify(options));
});

Deno.test("a reset that a write takes is no end to a read", async () => {
  using listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  for (const isDialed of [false, true]) {
    const { hostname, port } = listener.addr, to = { hostname, port };
    const [stream, server] = await Promise.all([
      isDialed ? dial({ ...to, tos: null }) : Deno.connect(to),
      listener.accept(),
    ]);
    using conn = MarkedConn.adopt(stream);
    reset(server);
    server.close();
    const { ConnectionReset } = Deno.errors;
    await assert.rejects(conn.write(new Uint8Array(10)), ConnectionReset);
    await assert.rejects(conn.read(new Uint8Array(10)), ConnectionReset);
    await assert.rejects(conn.read(new Uint8Array(10)), ConnectionReset);
  }
});

Deno.test("a server that resets at once is 56, whatever notices it, and never an empty reply", async () => {
  await using server = new RawServer(async (conn) => {
    reset(conn);
    await Promise.resolve();
  });
  for (let round = 0; round < 100; round++) {
    const markSyn = round % 2 === 1;
    await assert.rejects(get(server.url, { markSyn }), (error) => {
      assert.ok(error instanceof Failure);
      // A reset before the connection is known to be open is one that could not be made.
      assert.ok([Exit.connectionLost, Exit.cannotConnect].includes(error.code as 7), error.message);
      return true;
    });
  }
});
