import assert from "node:assert/strict";
import { TCP_NODELAY } from "../ffi/libc.ts";
import { dial, getTos, MarkedConn } from "../ffi/mod.ts";
import { getOption } from "../ffi/calls.ts";
import { Namespace } from "./support/namespaces.ts";
import { Capture, type Seen } from "./support/packets.ts";
import { Background, dscpGet, execute, testWith } from "./support/processes.ts";
import { Certificates, closedPort, latin1, RawServer, reset, send } from "./support/servers.ts";
import { until } from "./support/waiting.ts";

const NEEDS = ["openssl"];
const FLAGS = ["--allow-net", "--allow-ffi", "--allow-read"];

/** openssl's server with a certificate for localhost of a root of our own; gone when disposed of. */
class Secure implements AsyncDisposable {
  private constructor(
    readonly certificates: Certificates,
    readonly port: number,
    readonly process: Background,
  ) {}

  static async start(under: readonly string[] = []): Promise<Secure> {
    const certificates = await Certificates.create();
    const port = closedPort();
    const { key, certificate } = certificates;
    const serve = [...under, "openssl", "s_server", "-accept", `127.0.0.1:${port}`, "-www"];
    // With a second certificate it looks at the name that the client asks for (SNI).
    const first = ["-cert", certificate, "-key", key];
    const second = ["-servername", "localhost", "-cert2", certificate, "-key2", key];
    const process = new Background([...serve, ...first, ...second]);
    await process.until((said) => said.includes("ACCEPT"));
    return new Secure(certificates, port, process);
  }

  get root(): string {
    return this.certificates.root;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.process.stop();
    await this.certificates[Symbol.asyncDispose]();
  }
}

for (const path of [[], ["--mark-syn"]]) {
  const how = path.length === 0 ? "plain" : "marked from the SYN on";

  testWith(
    [...NEEDS, "root", "tcpdump"],
    `https: the mark is set before the ClientHello, and TLS packets count: ${how}`,
    async () => {
      await using server = await Secure.start();
      await using capture = await Capture.start(server.port);
      const url = `https://localhost:${server.port}/`;
      const args = ["--json", ...path, "--cacert", server.root, url];
      const { code, stdout, stderr } = await dscpGet(args, { flags: FLAGS });
      assert.equal(code, 0, stderr);
      const { reply, sent } = JSON.parse(stdout);
      assert.deepEqual([reply.status, sent.proved], [200, true]);
      assert.ok(sent.packets.length >= 2, "the ClientHello and the request at least");
      const data = (await capture.connection()).filter(({ to, length }) =>
        to === server.port && length > 0
      );
      assert.deepEqual(data.map(({ tos }) => tos), data.map(() => 0xb8));
      assert.ok(sent.packets.length <= data.length);
    },
  );

  testWith(
    NEEDS,
    `https: a certificate of an unknown root, or for another name, is 60; -k takes both: ${how}`,
    async () => {
      await using server = await Secure.start();
      const unknown = await dscpGet([...path, `https://localhost:${server.port}/`]);
      assert.equal(unknown.code, 60, unknown.stderr);
      assert.match(
        unknown.stderr,
        /^dscp-get: the server's certificate is not valid: .*\nhint: --cacert FILE .*-k/m,
      );
      const other = ["--cacert", server.root, `https://other.localhost:${server.port}/`];
      const misnamed = await dscpGet([...path, ...other], { flags: FLAGS });
      assert.ok([60, 6].includes(misnamed.code), misnamed.stderr); // not every resolver knows names below localhost
      const any = await dscpGet([...path, "-k", "-s", `https://localhost:${server.port}/`]);
      assert.equal(any.code, 0, any.stderr);
      assert.match(any.stdout, /s_server/);
    },
  );

  Deno.test(`https: a server that does not speak TLS is 35: ${how}`, async () => {
    await using server = new RawServer((conn) => send(conn, "HTTP/1.1 400 Bad Request\r\n\r\n"));
    const { code, stderr } = await dscpGet([...path, `https://127.0.0.1:${server.port}/`]);
    assert.equal(code, 35, stderr);
  });

  Deno.test(`https: a server that never answers the ClientHello ends in the time given: ${how}`, async () => {
    await using server = new RawServer(async (conn) => {
      while (await conn.read(new Uint8Array(4096)) !== null);
    });
    const url = `https://127.0.0.1:${server.port}/`;
    const { code, stderr } = await dscpGet([...path, "-m", "0.4", "-k", url]);
    assert.equal(code, 28, stderr);
    if (path.length > 0) return;
    assert.equal((await dscpGet(["-m", "0.4", url])).code, 28);
  });

  Deno.test(`https: a server that closes at once is 35: ${how}`, async () => {
    const listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
    const closing = listener.accept().then((conn) => conn.close());
    const { code, stderr } = await dscpGet([...path, `https://127.0.0.1:${listener.addr.port}/`]);
    assert.equal(code, 35, stderr);
    assert.match(stderr, /^dscp-get: TLS failed: /m);
    await closing;
    listener.close();
  });
}

for (const path of [[], ["--mark-syn"], ["-k"]]) {
  testWith(
    [...NEEDS, "root", "ip", "nft", "tcpdump"],
    `https: the last packet counts too, which ends TLS, tcpdump agrees: ${path[0] ?? "plain"}`,
    async () => {
      await using namespace = await Namespace.create();
      const { under } = namespace;
      await using server = await Secure.start(under);
      const run = async () => {
        await using capture = await Capture.start(server.port, "lo", under);
        const url = `https://localhost:${server.port}/`;
        const env = { DENO_CERT: server.root };
        const { code, stdout } = await dscpGet(["--json", ...path, url], { under, env });
        const sent = (await capture.connection()).filter(({ to, length }) =>
          to === server.port && length > 0
        );
        return { code, ...JSON.parse(stdout).sent, onWire: sent };
      };
      const clean = await run();
      const bytes = clean.onWire.reduce((sum: number, { length }: Seen) => sum + length, 0);
      assert.deepEqual([clean.code, clean.proved, clean.bytes], [0, true, {
        seen: bytes,
        sent: bytes,
      }]);
      // A record of TLS 1.3 with an alert is 24 bytes; none of the others is (RFC 8446, section 6).
      assert.deepEqual(clean.onWire.map(({ length }: Seen) => length === 24).slice(-2), [
        false,
        true,
      ]);
      const chain = "add chain ip t o { type filter hook output priority mangle; }";
      const rule = "add rule ip t o ip length 76 ip dscp ef ip dscp set cs1";
      await namespace.run("nft", `add table ip t; ${chain}; ${rule}`);
      const rewritten = await run();
      const marks = (packets: { tos: number }[]) => packets.map(({ tos }) => tos);
      assert.deepEqual([rewritten.code, rewritten.proved], [101, false]);
      assert.deepEqual(marks(rewritten.packets), marks(rewritten.onWire));
      assert.deepEqual(marks(rewritten.packets).slice(-2), [0xb8, 0x20]);
    },
  );
}

for (const isDialed of [false, true]) {
  testWith(
    NEEDS,
    `https: nothing waits for an ACK, and what is not seen to leave is not proved: ${isDialed}`,
    async () => {
      await using certificates = await Certificates.create();
      const [cert, key, ca] = [certificates.certificate, certificates.key, certificates.root]
        .map((file) => Deno.readTextFileSync(file));
      using listener = Deno.listenTls({ hostname: "127.0.0.1", port: 0, cert, key });
      const open = async () => {
        const to = { hostname: "127.0.0.1", port: listener.addr.port };
        const conn = MarkedConn.adopt(
          isDialed ? await dial({ ...to, tos: null }) : await Deno.connect(to),
        );
        assert.equal(getOption(conn.fd, TCP_NODELAY), 0);
        const trust = { caCerts: [ca], insecure: false };
        const [server] = await Promise.all([
          listener.accept().then(async (server) => (await server.handshake(), server)),
          isDialed ? conn.startTls("localhost", trust) : startWithRoot(conn, ca),
        ]);
        assert.equal(getOption(conn.fd, TCP_NODELAY), 1);
        await conn.write(new Uint8Array(10));
        return { conn, server };
      };
      const seen = (conn: MarkedConn) => conn.sent.reduce((sum, { payload }) => sum + payload, 0);
      const whole = await open();
      await whole.conn.finish();
      assert.equal(seen(whole.conn), whole.conn.dataSent);
      await whole.conn.finish();
      whole.server.close();
      const cut = await open();
      cut.conn.close();
      assert.equal(cut.conn.dataSent, null);
      assert.ok(seen(cut.conn) > 0);
      cut.server.close();
      if (!isDialed) return;
      // What the other end does not read cannot be ended in order, and is not waited for.
      const full = await open();
      const writing = full.conn.write(new Uint8Array(8 << 20)).catch(() => {});
      await full.conn.finish();
      await writing;
      assert.equal(full.conn.dataSent, null);
      full.server.close();
    },
  );
}

/** Deno's own TLS, which takes roots when it begins and not from a trust. */
async function startWithRoot(conn: MarkedConn, ca: string): Promise<void> {
  const { startTls } = Deno;
  Deno.startTls = (tcp, options) => startTls(tcp, { ...options, caCerts: [ca] });
  try {
    await conn.startTls("localhost", null);
  } finally {
    Deno.startTls = startTls;
  }
}

testWith(
  NEEDS,
  "https: a connection of a dialed socket is read in pieces of any size, and tells of a reset",
  async () => {
    const { secured, other, close } = await securedPair();
    assert.equal(getTos(secured), 0xb8);
    await send(other, "hello");
    const bytes = new Uint8Array(2);
    const pieces: string[] = [];
    for (let left = 5; left > 0;) {
      const size = (await secured.read(bytes))!;
      pieces.push(new TextDecoder().decode(bytes.subarray(0, size)));
      left -= size;
    }
    assert.deepEqual(pieces, ["he", "ll", "o"]);
    reset(other);
    await assert.rejects(secured.read(bytes), Deno.errors.ConnectionReset);
    close();
  },
);

testWith(
  [...NEEDS, "curl"],
  "https: bytes before a bad TLS record are passed on, as curl does, and then it is 56",
  async () => {
    await using certificates = await Certificates.create();
    const [cert, key] = await Promise.all(
      [certificates.certificate, certificates.key].map((file) => Deno.readTextFile(file)),
    );
    using listener = Deno.listenTls({ hostname: "127.0.0.1", port: 0, cert, key });
    const reply = "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello";
    // TLS 1.3 adds the type of the content and 16 bytes of authentication.
    const header = (length: number) => `\x17\x03\x03\0${String.fromCharCode(length + 17)}`;
    const bad = latin1(`${header(32)}${"x".repeat(49)}`);
    await using forwarder = new RawServer(async (conn) => {
      using server = await Deno.connect({ hostname: "127.0.0.1", port: listener.addr.port });
      const requests = conn.readable.pipeTo(server.writable).catch(() => {});
      const buffer = new Uint8Array(65536);
      for (let size; (size = await server.read(buffer)) !== null;) {
        const record = buffer.subarray(Math.max(0, size - 5 - reply.length - 17), size);
        const isReply = new TextDecoder("latin1").decode(record).startsWith(header(reply.length));
        if (isReply) buffer.set(bad, size);
        await send(conn, buffer.subarray(0, isReply ? size + bad.length : size));
        if (isReply) break;
      }
      await requests;
    });
    const serve = async () => {
      using conn = await listener.accept();
      await conn.read(new Uint8Array(1000));
      await send(conn, reply);
      await conn.read(new Uint8Array(1000)).catch(() => {});
    };
    const url = `https://localhost:${forwarder.port}/`;
    const [curl] = await Promise.all([execute(["curl", "-s", "-k", url]), serve()]);
    assert.deepEqual([curl.code, curl.stdout], [56, "hello"]);
    for (const how of [["-k"], ["-k", "--mark-syn"], ["--cacert", certificates.root]]) {
      const [ours] = await Promise.all([dscpGet([...how, url], { flags: FLAGS }), serve()]);
      assert.deepEqual([ours.code, ours.stdout], [56, "hello"], ours.stderr);
    }
  },
);

testWith(NEEDS, "https: a closed dialed connection says so to whoever reads it", async () => {
  const { secured, close } = await securedPair();
  const waiting = secured.read(new Uint8Array(1));
  close();
  for (const read of [waiting, secured.read(new Uint8Array(1))]) {
    await assert.rejects(read, Deno.errors.BadResource);
  }
});

testWith(
  NEEDS,
  "https: a dialed connection receives no more than is read, and the rest once it is",
  async () => {
    const { secured, other, close } = await securedPair();
    const size = 64 << 20, piece = new Uint8Array(1 << 20).fill(0x61);
    let sent = 0;
    const sending = (async () => {
      for (; sent < size; sent += piece.length) await send(other, piece);
    })();
    // What the buffers of both ends hold, and then no more.
    for (let before = -1, turns = 0; turns < 1000; turns++) {
      if (sent > before) turns = 0;
      before = sent;
      await new Promise((resolve) => setImmediate(resolve));
    }
    assert.ok(sent < size / 2, `${sent} bytes`);
    let received = 0;
    const buffer = new Uint8Array(256 * 1024);
    while (received < size) received += await secured.read(buffer) ?? assert.fail("it has ended");
    await sending;
    assert.equal(received, size);
    close();
  },
);

/** Two ends of a TLS connection in this process; the first was dialed with 0xB8. */
async function securedPair() {
  await using certificates = await Certificates.create();
  const [cert, key, ca] = await Promise.all(
    [certificates.certificate, certificates.key, certificates.root].map((file) =>
      Deno.readTextFile(file)
    ),
  );
  using listener = Deno.listenTls({ hostname: "127.0.0.1", port: 0, cert, key });
  const dialed = await dial({ hostname: "127.0.0.1", port: listener.addr.port, tos: 0xb8 });
  const [secured, other] = await Promise.all([
    dialed.startTls("localhost", { caCerts: [ca], insecure: false }),
    listener.accept().then(async (conn) => (await conn.handshake(), conn)),
  ]);
  const close = () => {
    secured.close();
    other.close();
  };
  return { secured, other, close };
}

testWith(NEEDS, "--cacert says clearly what is wrong: permission 103, file 77", async () => {
  const url = "https://127.0.0.1:1/";
  const denied = await dscpGet(["--cacert", "/etc/hostname", url]);
  assert.deepEqual([denied.code, denied.stderr], [
    103,
    "dscp-get: no permission to read '/etc/hostname'\nhint: run with --allow-read or --allow-read=/etc/hostname\n",
  ]);
  const missing = await dscpGet(["--cacert", "/does/not/exist", url], { flags: FLAGS });
  assert.equal(missing.code, 77);
  assert.match(missing.stderr, /cannot read '\/does\/not\/exist': no such file or directory$/m);
  const nothing = await dscpGet(["--cacert", "", url], { flags: FLAGS });
  assert.equal(nothing.stderr, "dscp-get: --cacert needs the name of a file\n");
  assert.equal(nothing.code, 77);
  const empty = await dscpGet(["--cacert", "/dev/null", url], { flags: FLAGS });
  assert.match(empty.stderr, /'\/dev\/null' holds no certificate in PEM form/);
  assert.equal(empty.code, 77);
  const file = await Deno.makeTempFile();
  for (const text of ["AAAA\n-----END CERTIFICATE-----", "AAAA"]) {
    await Deno.writeTextFile(file, `-----BEGIN CERTIFICATE-----\n${text}\n`);
    const broken = await dscpGet(["--cacert", file, url], { flags: FLAGS });
    assert.deepEqual([broken.code, broken.stderr], [
      77,
      `dscp-get: certificate 1 in '${file}' is broken\n`,
    ]);
  }
  // Words about certificates in a bundle are none, and several are read.
  await using certificates = await Certificates.create();
  const good = await Deno.readTextFile(certificates.root);
  await Deno.writeTextFile(file, `${good}# -----BEGIN CERTIFICATE----- of nobody\r\n${good}`);
  assert.equal((await dscpGet(["--cacert", file, url], { flags: FLAGS })).code, 7);
  await Deno.remove(file);
});

testWith(
  ["root", "ip", "openssl"],
  "http:// to the port of a TLS server that only closes hints at https",
  async () => {
    await using namespace = await Namespace.create();
    await using made = await Certificates.create();
    const files = ["-cert", made.certificate, "-key", made.key];
    await using server = new Background([
      ...namespace.under,
      ..."openssl s_server -accept 127.0.0.1:8443 -quiet -naccept 1".split(" "),
      ...files,
    ]);
    const outcome = await until(async () => {
      const outcome = await dscpGet(["http://127.0.0.1:8443/"], namespace);
      return outcome.code === 7 ? null : outcome;
    }, "openssl to listen");
    assert.ok([52, 56].includes(outcome.code), outcome.stderr + server.said);
    assert.match(outcome.stderr, /^hint: the server may speak TLS: is it https:\/\/\?$/m);
  },
);

testWith(
  ["openssl"],
  "what is wrong with a certificate is said in words, and how to go on",
  async () => {
    await using certificates = await Certificates.create();
    const { root, key, folder } = certificates,
      expired = `${folder}/expired`,
      config = `${folder}/ca`;
    await Deno.writeTextFile(`${folder}/index`, "");
    await Deno.writeTextFile(
      config,
      `[ca]\ndefault_ca = d\n[d]\ndatabase = ${folder}/index\nnew_certs_dir = ${folder}\n` +
        "default_md = sha256\npolicy = p\nrand_serial = yes\n[p]\ncommonName = supplied\n",
    );
    const by = ["-batch", "-config", config, "-cert", root, "-keyfile", `${folder}/root.key`];
    const dates = ["-startdate", "20200101000000Z", "-enddate", "20200201000000Z"];
    const files = ["-in", `${folder}/csr`, "-extfile", `${folder}/ext`, "-out", expired, "-notext"];
    const made = await execute(["openssl", "ca", ...by, ...dates, ...files]);
    assert.equal(made.code, 0, made.stderr);
    const untrusted = "its issuer is not trusted, or it is not valid today";
    for (
      const [certificate, host, how, words, hint] of [
        [expired, "localhost", [], "it was valid until 2020-02-01", "-k accepts any"],
        [expired, "localhost", ["--mark-syn"], untrusted, "--cacert FILE trusts"],
        [
          certificates.certificate,
          "127.0.0.2",
          [],
          "it is for another host name",
          "-k accepts any",
        ],
        [
          certificates.certificate,
          "127.0.0.2",
          ["--mark-syn"],
          "it is for another host name",
          "-k accepts",
        ],
      ] as const
    ) {
      const [cert, privateKey] = [certificate, key].map((file) => Deno.readTextFileSync(file));
      using listener = Deno.listenTls({ hostname: host, port: 0, cert, key: privateKey });
      const accepting = listener.accept().then((conn) =>
        conn.handshake().catch(() => {}).finally(() => conn.close())
      );
      const url = `https://${host}:${listener.addr.port}/`;
      const { code, stderr } = await dscpGet([...how, url], { env: { DENO_CERT: root } });
      assert.equal(code, 60, stderr);
      const lines = stderr.trimEnd().split("\n").slice(-2);
      assert.equal(lines[0], `dscp-get: the server's certificate is not valid: ${words}`);
      assert.ok(lines[1].startsWith(`hint: ${hint}`), stderr);
      await accepting;
    }
  },
);
