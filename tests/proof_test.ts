import assert from "node:assert/strict";
import { startConnect } from "../ffi/dial.ts";
import { close, EINPROGRESS, IPPROTO_MPTCP, send as libcSend, socket } from "../ffi/libc.ts";
import { fdOf, getTos, setTos, watchSent } from "../ffi/mod.ts";
import { AF_INET, encode } from "../ffi/sockaddr.ts";
import { Exit, type Failure, get } from "../main.ts";
import { Namespace, Network, rewrite, SERVER } from "./support/namespaces.ts";
import { Capture } from "./support/packets.ts";
import {
  Background,
  command,
  dscpGet,
  execute,
  inject,
  missing,
  Nobody,
  type Outcome,
  testWith,
} from "./support/processes.ts";
import {
  Certificates,
  FarEnd,
  OK,
  RawServer,
  replying,
  replyingOn,
  send,
  startNginx,
  startPython,
} from "./support/servers.ts";
import { until } from "./support/waiting.ts";

const CLIENT = "192.0.2.2";

for (const host of ["127.0.0.1", "[::1]", "[::ffff:127.0.0.1]"]) {
  testWith(
    ["root", "tcpdump"],
    `every packet after the handshake carries the mark, tcpdump agrees: ${host}`,
    async () => {
      await using server = replyingOn(host === "[::1]" ? "::1" : "127.0.0.1", OK);
      await using capture = await Capture.start(server.port);
      const { code, stdout, stderr } = await dscpGet(["--json", `http://${host}:${server.port}/`]);
      assert.equal(code, 0, stderr);
      const result = JSON.parse(stdout);
      assert.equal(result.sent.proved, true);
      const fromClient = (await capture.connection()).filter(({ to }) => to === server.port);
      const [syn, ack, ...rest] = fromClient;
      assert.deepEqual([syn.flags, syn.tos, ack.flags, ack.tos], ["S", 0, ".", 0]);
      assert.equal(result.mark.handshake, false);
      assert.ok(
        rest.some(({ flags }) => flags.includes("P")) &&
          rest.some(({ flags }) => flags.includes("F")),
      );
      assert.deepEqual(rest.map(({ tos }) => tos), rest.map(() => 0xb8));
      assert.deepEqual(result.sent.packets.map(({ tos }: { tos: number }) => tos), [0xb8]);
      const header = host === "[::1]" ? 40 : 20;
      const data = rest.find(({ length }) => length > 0)!;
      // 32 bytes of TCP header: 20 and the timestamps option.
      assert.equal(result.sent.packets[0].length, header + 32 + data.length);
    },
  );
}

testWith(
  ["root", "tcpdump"],
  "each mark that can be asked for is the one on the wire",
  async () => {
    for (
      const [args, tos] of [[["-d", "cs0"], 0], [["-d", "AF43"], 0x98], [["--tos", "0xFC"], 0xfc], [
        ["-d", "le"],
        4,
      ]] as const
    ) {
      await using server = replying(OK);
      await using capture = await Capture.start(server.port);
      const { code, stdout } = await dscpGet(["--json", ...args, server.url]);
      assert.equal(code, 0);
      assert.deepEqual(JSON.parse(stdout).sent.packets.map((p: { tos: number }) => p.tos), [tos]);
      const data = (await capture.connection()).filter(({ to, length }) =>
        to === server.port && length > 0
      );
      assert.deepEqual(data.map((p) => p.tos), [tos]);
    }
  },
);

testWith(
  ["root", "ip", "nft", "tcpdump"],
  "an nftables rule on this host that rewrites EF to CS1 is found out: 101",
  async () => {
    await using namespace = await Namespace.create();
    await rewrite(namespace, "output", "ef", "cs1");
    await using capture = await Capture.start(8086, "lo", namespace.under);
    const { code, stdout, stderr } = await dscpGet([], namespace);
    assert.equal(code, 101);
    assert.match(stderr, /reads back 0xB8/);
    assert.match(
      stderr,
      /^dscp-get: set 0xB8, left with 0x20: something on this host, such as nftables, rewrote it$/m,
    );
    assert.match(stdout, /built-in server/);
    const seen = (await capture.connection()).filter(({ to, length }) => to === 8086 && length > 0);
    assert.deepEqual(seen.map(({ tos }) => tos), [0x20]);

    const { sent, error } = JSON.parse((await dscpGet(["--json"], namespace)).stdout);
    assert.deepEqual([sent.proved, sent.packets[0].tos, error.code], [false, 0x20, 101]);

    const other = await dscpGet(["-d", "AF41"], namespace);
    assert.equal(other.code, 0, "a mark that the rule does not touch passes");
  },
);

testWith(
  ["root", "ip", "tcpdump"],
  "ECN bits that TCP adds to its packets do not count as another mark",
  async () => {
    await using namespace = await Namespace.create();
    await namespace.run("sysctl", "-q", "-w", "net.ipv4.tcp_ecn=1");
    await using capture = await Capture.start(8086, "lo", namespace.under);
    const { code, stdout } = await dscpGet(["--json"], namespace);
    assert.equal(code, 0);
    const { sent } = JSON.parse(stdout);
    assert.deepEqual([sent.proved, sent.packets[0].tos], [true, 0xba]);
    const seen = (await capture.connection()).filter(({ to, length }) => to === 8086 && length > 0);
    assert.deepEqual(seen.map(({ tos }) => tos), [0xba]);
    const { stderr } = await dscpGet([], namespace);
    assert.match(
      stderr,
      /^sent +1 packet with 0xBA, .*: proved\n {11}\(its two lowest bits are ECN, .*\)$/m,
    );
  },
);

testWith(
  ["root", "ip", "nft"],
  "behind NAT on this host: proved while one end is kept, not observed when both change",
  async () => {
    await using namespace = await Namespace.create();
    await namespace.run(
      "nft",
      "add table ip nat; add chain ip nat out { type nat hook output priority -100; }",
    );
    await namespace.run("nft", "add rule ip nat out ip daddr 127.0.0.2 dnat to 127.0.0.1");
    await using _server = await startPython(["8086"], namespace.under);
    const oneEnd = await dscpGet(["--json", "http://127.0.0.2:8086/"], namespace);
    assert.deepEqual([oneEnd.code, JSON.parse(oneEnd.stdout).sent.proved], [0, true]);

    await namespace.run("nft", "add chain ip nat post { type nat hook postrouting priority 100; }");
    await namespace.run("nft", "add rule ip nat post tcp dport 8086 snat to 127.0.0.3");
    const bothEnds = await dscpGet(["--json", "http://127.0.0.2:8086/"], namespace);
    assert.equal(bothEnds.code, 0, bothEnds.stderr);
    const { proved, bytes, packets } = JSON.parse(bothEnds.stdout).sent;
    assert.deepEqual([proved, bytes.seen, packets], [null, 0, []]);
    assert.ok(bytes.sent > 0);
    assert.match(
      (await dscpGet(["http://127.0.0.2:8086/"], namespace)).stderr,
      /^sent +not observed/m,
    );
  },
);

testWith(["root", "setpriv"], "nobody gets the same proof as root", async () => {
  await using nobody = await Nobody.create();
  await using server = replying(OK);
  const { code, stdout, stderr } = await execute([...nobody.command, "--json", server.url]);
  assert.equal(code, 0, stderr);
  assert.deepEqual(JSON.parse(stdout).sent.packets.map((p: { tos: number }) => p.tos), [0xb8]);
});

// ─── Tunnels ─────────────────────────────────────────────────────────────────────────────────────

/** The ends of the tunnels below, in the client and in the server of a network. */
const INNER = { client: "10.9.0.1", server: "10.9.0.2" };

/** Runs the script through a tunnel over UDP, and reads the ToS byte around its request. */
async function through(
  network: Network,
  ...args: string[]
): Promise<Outcome & { outerTos: number }> {
  // Nothing but the request is that large.
  const filter = `udp and src host ${CLIENT} and greater 150`;
  const words = [..."tcpdump -i c0 -n -v -l -U --immediate-mode".split(" "), filter];
  await using tcpdump = new Background([...network.client.under, ...words]);
  await tcpdump.until((said) => said.includes("listening on"));
  const outcome = await dscpGet([...args, `http://${INNER.server}:8086/`], network.client);
  const said = await tcpdump.until((said) => said.includes(" IP (tos "));
  return { ...outcome, outerTos: Number(/ IP \(tos (0x[0-9a-f]+)/.exec(said)![1]) };
}

for (
  const { tos, outerTos, code } of [
    { tos: "0", outerTos: 0, code: 101 },
    { tos: "0x20", outerTos: 0x20, code: 101 },
    { tos: "inherit", outerTos: 0xb8, code: 0 },
  ]
) {
  testWith(
    ["root", "ip", "tcpdump"],
    `inside VXLAN with tos ${tos} the tunnel's own packets count, tcpdump agrees: ${code}`,
    async () => {
      await using network = await Network.create();
      const { client, server } = network;
      for (
        const [host, local, remote, address] of [
          [client, CLIENT, SERVER.ipv4, INNER.client],
          [server, SERVER.ipv4, CLIENT, INNER.server],
        ] as const
      ) {
        const vxlan = `type vxlan id 1 dstport 4789 local ${local} remote ${remote} tos ${tos}`;
        await host.run("ip", "link", "add", "vx0", ...vxlan.split(" "));
        await host.run("ip", "addr", "add", `${address}/24`, "dev", "vx0");
        await host.run("ip", "link", "set", "vx0", "up");
      }
      await using _server = await FarEnd.start("[::]:8086", server.under);
      for (const args of [[], ["--mark-syn"]]) {
        const json = await through(network, "--json", ...args);
        assert.deepEqual([json.code, json.outerTos], [code, outerTos], json.stderr);
        const { sent, error } = JSON.parse(json.stdout);
        assert.deepEqual(
          [sent.proved, sent.outerTos, sent.packets[0].tos, error?.code ?? 0],
          [code === 0, outerTos, 0xb8, code],
        );
      }
      const { stderr } = await through(network);
      const byte = outerTos.toString(16).toUpperCase().padStart(2, "0");
      const verdict = code === 0 ? "proved" : "NOT the mark that was set";
      const line = `inside a tunnel\n {11}whose packets carry 0x${byte}: ${verdict}$`;
      assert.match(stderr, new RegExp(`^sent +1 packet with 0xB8, .*${line}`, "m"));
      const said =
        `^dscp-get: set 0xB8, left inside a tunnel whose packets carry 0x${byte}\nhint: `;
      assert.equal(new RegExp(said, "m").test(stderr), code === 101, stderr);
      const table = await dscpGet(["-n", "2", `http://${INNER.server}:8086/`], client);
      assert.equal(table.code, code);
      assert.match(table.stdout, code === 0 ? /^EF +0xB8 +-/m : /^EF +0xB8 0x\w\w ! /m);
    },
  );
}

testWith(
  ["root", "ip", "tcpdump", "socat"],
  "what a tunnel device takes is not proved: its relay sends it with another mark, tcpdump agrees",
  async () => {
    await using network = await Network.create();
    const { client, server } = network;
    const relay = async (
      under: readonly string[],
      local: string,
      remote: string,
      inner: string,
    ) => {
      const udp = `UDP4-DATAGRAM:${remote}:5000,bind=${local}:5000`;
      const tun = `TUN:${inner}/24,tun-type=tun,iff-no-pi,iff-up`;
      const socat = new Background([...under, "socat", "-d", "-d", udp, tun]);
      await socat.until((said) => said.includes("starting data transfer"));
      return socat;
    };
    await using _near = await relay(client.under, CLIENT, SERVER.ipv4, INNER.client);
    await using _far = await relay(server.under, SERVER.ipv4, CLIENT, INNER.server);
    await using _server = await FarEnd.start("[::]:8086", server.under);
    const { code, stdout, outerTos } = await through(network, "--json", "--mark-syn");
    assert.deepEqual([code, outerTos], [0, 0]);
    const { sent, arrived } = JSON.parse(stdout);
    assert.deepEqual([sent.proved, sent.outerTos, sent.packets[0].tos], [null, null, 0xb8]);
    assert.deepEqual([arrived.syn, sent.bytes.seen], [0xb8, sent.bytes.sent]);
    const { stderr } = await through(network);
    assert.match(stderr, /^sent +1 packet with 0xB8, handed to a tunnel device, whose own /m);
  },
);

// ─── Requests of several packets ─────────────────────────────────────────────────────────────────

testWith(
  ["root", "ip", "nft", "tcpdump"],
  "of a request of several packets each is looked at: one that is rewritten is found every time",
  async () => {
    await using network = await Network.create();
    const { client, server } = network;
    await using _server = await FarEnd.start("[::]:8086", server.under);
    const headers = ["-H", `X: ${"x".repeat(12_000)}`];
    const url = `http://${SERVER.ipv4}:8086/`;
    const whole = JSON.parse((await dscpGet(["--json", ...headers, url], client)).stdout);
    const { seen, sent } = whole.sent.bytes;
    assert.deepEqual([whole.sent.proved, seen], [true, sent]);
    assert.ok(sent > 12_000 && whole.sent.packets.length > 1);
    await client.run(
      "nft",
      "add table ip t; add chain ip t o { type route hook output priority 0; }",
    );
    const second = "ip dscp ef numgen inc mod 2 1 ip dscp set cs1";
    await client.run("nft", `add rule ip t o meta length > 1000 ${second}`);
    for (const args of [[], ["--mark-syn"], [], ["--mark-syn"], []]) {
      await using capture = await Capture.start(8086, "c0", client.under);
      const { code, stdout } = await dscpGet(["--json", ...args, ...headers, url], client);
      const { sent } = JSON.parse(stdout);
      assert.deepEqual([code, sent.proved], [101, false]);
      const data = (await capture.connection()).filter(({ to, length }) =>
        to === 8086 && length > 0
      );
      const bytes = (packets: { tos: number }[]) => packets.map(({ tos }) => tos);
      assert.deepEqual(bytes(sent.packets), bytes(data));
      assert.deepEqual(new Set(bytes(data)), new Set([0xb8, 0x20]));
    }
  },
);

testWith(
  ["root", "ip", "tc", "nginx", "openssl"],
  "all of a request of several packets is proved, over TLS and on a slow link as well",
  async () => {
    await using certificates = await Certificates.create();
    await using namespace = await Namespace.create();
    await namespace.run(..."ip link set lo mtu 1500".split(" "));
    await namespace.run(
      ..."tc qdisc add dev lo root tbf rate 8mbit burst 3kb latency 10s".split(" "),
    );
    await using _server = await startNginx(
      certificates.folder,
      `large_client_header_buffers 4 32k; ssl_certificate ${certificates.certificate};
       ssl_certificate_key ${certificates.key};
       server { listen 8080; listen 8443 ssl; return 200 "ok"; }`,
      namespace.under,
    );
    const options = { under: namespace.under, env: { DENO_CERT: certificates.root } };
    for (const url of ["http://127.0.0.1:8080/", "https://localhost:8443/"]) {
      for (const size of [400, 1100, 1300, 2500, 9000, 15_000]) {
        const args = ["--json", "--require-proof", "-H", `X: ${"x".repeat(size)}`];
        const { code, stdout, stderr } = await dscpGet([...args, url], options);
        const { sent: { proved, bytes } } = JSON.parse(stdout);
        assert.deepEqual([code, proved, bytes.seen], [0, true, bytes.sent], `${size}: ${stderr}`);
      }
    }
  },
);

testWith(
  ["root", "ip", "ss", "sysctl"],
  "a request of which only a part is looked at is proved in part, which is not proved",
  async () => {
    await using namespace = await Namespace.create();
    // Copies that do not fit the receive buffer are dropped by the kernel.
    await namespace.run("sysctl", "-qw", "net.ipv4.tcp_rmem=2304 2304 2304");
    await using server = await FarEnd.start("8086", namespace.under);
    const result = JSON.parse(await leaveUnread(["--json"], namespace, server, 0));
    const { proved, bytes: { seen, sent } } = result.sent;
    assert.equal(proved, null);
    assert.ok(0 < seen && seen < sent && sent > 12_000, `${seen} of ${sent}`);
    const required = await leaveUnread(["--require-proof"], namespace, server, 104);
    assert.match(required, /^sent +.* with 0xB8: proved for \d+ of \d+ bytes$/m);
    assert.match(required, /^dscp-get: only \d+ of \d+ bytes were observed leaving$/m);
  },
);

for (const [host, family] of [[SERVER.ipv4, 4], [`[${SERVER.ipv6}]`, 6]] as const) {
  testWith(
    ["root", "ip", "tcpdump"],
    `a large request is proved though its path's MTU is learned on the way: IPv${family}`,
    async () => {
      await using network = await Network.create();
      const { client, router, server } = network;
      await router.run(..."ip link set r1 mtu 1300".split(" "));
      // Without this one copy would be of several packets, which the device would make.
      await client.run(..."ip link set c0 gso_max_segs 1".split(" "));
      await using _server = await FarEnd.start("[::]:8086", server.under);
      const args = ["--json", "--require-proof", "-H", `X: ${"x".repeat(9000)}`];
      for (const how of [[], ["--mark-syn"]]) {
        // What was learned is kept for each destination.
        await client.run("ip", `-${family}`, ..."route flush cache".split(" "));
        await using capture = await Capture.start(8086, "c0", client.under);
        const run = await dscpGet([...args, ...how, `http://${host}:8086/`], client);
        const { proved, bytes } = JSON.parse(run.stdout).sent;
        assert.deepEqual([run.code, proved, bytes.seen], [0, true, bytes.sent], run.stderr);
        const sizes = capture.packets.filter(({ to }) => to === 8086).map(({ length }) => length);
        const largest = 1300 - (family === 4 ? 20 : 40) - 32;
        assert.ok(sizes.includes(largest) && sizes.some((size) => size > largest), `${sizes}`);
      }
    },
  );
}

/**
 * Runs the script with a large request of which most packets leave while it is stopped, so that it
 * cannot read their copies. Returns what it printed.
 */
async function leaveUnread(
  args: readonly string[],
  namespace: Namespace,
  { process: server, port, url }: FarEnd,
  expected: number,
): Promise<string> {
  const queued = async () => {
    const filter = `( sport = :${port} or dport = :${port} )`;
    const { stdout } = await namespace.run("ss", "-Htn", "state", "established", filter);
    const queues = stdout.matchAll(/^(\d+) +(\d+) /gm);
    return queues.reduce((sum, [, received, sent]) => sum + Number(received) + Number(sent), 0);
  };
  // The window of the server that does not read holds the rest of the request back.
  server.child.kill("SIGSTOP");
  const large = ["-H", `X: ${"x".repeat(12_000)}`];
  await using client = new Background(command([...args, ...large, url], namespace));
  await until(async () => client.hasEnded || await queued() >= 12_000, "a request in the queues");
  client.child.kill("SIGSTOP");
  server.child.kill("SIGCONT");
  await until(async () => await queued() === 0, "empty queues");
  client.child.kill("SIGCONT");
  const { code } = await client.end();
  assert.equal(code, expected, client.said);
  return client.said;
}

// ─── Not observed ────────────────────────────────────────────────────────────────────────────────

testWith(
  ["strace"],
  "a kernel that refuses copies of packets took the mark all the same: not observed, exit 0",
  async () => {
    await using server = replying(OK);
    const refuse = (n: number) => `error=EPERM:when=${n}`;
    const args = ["--json", server.url];
    const { code, stdout } = await inject("setsockopt", "SO_TIMESTAMPING", refuse, args);
    assert.equal(code, 0);
    const { mark, sent } = JSON.parse(stdout);
    assert.deepEqual([mark.readBack, sent.proved, sent.packets], [0xb8, null, []]);
    const plain = await inject("setsockopt", "SO_TIMESTAMPING", refuse, [server.url]);
    assert.match(plain.stderr, /^sent +not observed/m);
  },
);

testWith(
  ["root", "ip", "setpriv"],
  "where a sysctl lets only root see copies, nobody is told so: not observed",
  async () => {
    await using namespace = await Namespace.create();
    await using nobody = await Nobody.create();
    await namespace.run("sysctl", "-q", "-w", "net.core.tstamp_allow_data=0");
    const { code, stderr } = await execute([...namespace.under, ...nobody.command]);
    assert.equal(code, 0, stderr);
    assert.match(stderr, /^sent +not observed[^]*net\.core\.tstamp_allow_data is 0$/m);
    assert.match((await dscpGet([], namespace)).stderr, /^sent .*: proved$/m);
  },
);

testWith(
  ["root", "ip", "nft"],
  "a wrong mark is not hidden by what else went wrong: 101, and both are named",
  async () => {
    await using namespace = await Namespace.create();
    await rewrite(namespace, "output", "ef", "cs1");
    await using server = await startPython(["8080"], namespace.under);
    await server.until((said) => said.includes("Serving"));
    const url = "http://127.0.0.1:8080/none";
    const { code, stderr } = await dscpGet(["-f", url], namespace);
    assert.equal(code, 101);
    assert.match(stderr, /set 0xB8, left with 0x20: .*; the server answered 404 /);
    const series = await dscpGet(["-f", "-n", "2", url], namespace);
    assert.equal(series.code, 101);
    assert.match(series.stdout, /^EF +0x20 ! +- +2 +2 +2 /m);
    const closed = await dscpGet(["-f", "http://127.0.0.1:8081/"], namespace);
    assert.equal(closed.code, 7, "nothing was sent");
  },
);

const TOO_LARGE = "HTTP/1.1 431 Request Header Fields Too Large\r\nContent-Length: 0\r\n\r\n";

testWith(
  ["openssl"],
  "a request that is answered before all of it was written is not proved, over TLS neither: 104",
  async () => {
    const over = Promise.withResolvers<void>();
    const answer = async (conn: Deno.Conn) => {
      await conn.read(new Uint8Array(4096));
      await send(conn, TOO_LARGE);
      await over.promise;
    };
    await using server = new RawServer(answer);
    await using certificates = await Certificates.create();
    const [cert, key, root] = [certificates.certificate, certificates.key, certificates.root]
      .map((file) => Deno.readTextFileSync(file));
    using listener = Deno.listenTls({ hostname: "127.0.0.1", port: 0, cert, key });
    const serving = (async () => {
      const conns = [];
      for (let at = 0; at < 2; at++) {
        const conn = await listener.accept();
        conns.push(answer(conn).catch(() => {}).finally(() => conn.close()));
      }
      await Promise.all(conns);
    })().catch((error) => {
      // A test that fails closes the listener.
      if (!(error instanceof Deno.errors.BadResource)) throw error;
    });
    using _over = { [Symbol.dispose]: over.resolve };
    // 8 MiB do not fit the buffers of a server that reads nothing more.
    const headers = [["X-Pad", "x".repeat(8 << 20)]] as const;
    const trust = { caCerts: [root], insecure: false };
    const { port } = listener.addr;
    for (
      const [url, options] of [
        [server.url, { headers }],
        [server.url, { headers, markSyn: true }],
        [`https://localhost:${port}/`, { headers, trust }],
      ] as const
    ) {
      const { sent, reply } = await get(url, options);
      assert.deepEqual([reply!.status, sent.proved, sent.bytes.sent], [431, null, null]);
      await assert.rejects(
        get(url, { ...options, requireProof: true }),
        ({ code }: Failure) => code === Exit.notProved,
      );
    }
    over.resolve();
    await serving;
  },
);

testWith(
  ["root", "ip", "nft", "tcpdump"],
  "a request that a rule hands to a proxy on this host is not proved, and 104 with --require-proof",
  async () => {
    await using network = await Network.create();
    const { client } = network;
    await using _proxy = await FarEnd.start("0.0.0.0:15001", client.under);
    const chain = "add chain ip n o { type nat hook output priority -100; }";
    const rule = "add rule ip n o tcp dport 8086 redirect to :15001";
    await client.run("nft", `add table ip n; ${chain}; ${rule}`);
    await using capture = await Capture.start(15001, "lo", client.under);
    const url = `http://${SERVER.ipv4}:8086/`;
    const { code, stdout, stderr } = await dscpGet(["--require-proof", "--json", url], client);
    assert.equal(code, 104, stderr);
    assert.equal(JSON.parse(stdout).sent.proved, null);
    // It came to the loopback device.
    await capture.until((packets) => packets.some(({ tos, length }) => tos === 0xb8 && length > 0));
    const { stderr: report } = await dscpGet([url], client);
    assert.match(
      report.replace(/\n +/g, " "),
      /^sent +1 packet with 0xB8, handed to a program on this host, whose own packets are not obs/m,
    );
    // A request to this host itself is what was asked for.
    const here = await dscpGet(["--require-proof", "http://127.0.0.1:15001/"], client);
    assert.equal(here.code, 0, here.stderr);
  },
);

testWith(
  ["root", "ip", "nft", "tcpdump"],
  "a mark that is rewritten only when a packet is sent again is found out",
  async () => {
    await using network = await Network.create();
    await using _server = await FarEnd.start("0.0.0.0:8086", network.server.under);
    const chain = "add chain ip t f { type filter hook forward priority 0; }";
    const drop = "add rule ip t f tcp flags & psh == psh drop";
    await network.router.run("nft", `add table ip t; ${chain}; ${drop}`);
    await using capture = await Capture.start(8086, "c0", network.client.under);
    await using run = new Background(command([`http://${SERVER.ipv4}:8086/`], network.client));
    const sent = (tos: number) =>
      capture.until((all) => all.some((seen) => seen.length > 0 && seen.tos === tos));
    await sent(0xb8);
    await rewrite(network.client, "output", "ef", "cs1");
    await network.router.run("nft", "flush", "ruleset");
    await sent(0x20);
    await run.end();
    assert.match(run.said, /^sent .*0xB8 and 0x20, .*: NOT the mark\n +that was set$/m);
    assert.match(run.said, /^dscp-get: set 0xB8, left with 0x20: /m);
  },
);

const mptcp = socket(AF_INET, 1, IPPROTO_MPTCP);
if (mptcp >= 0) close(mptcp);

Deno.test({
  name: `a socket of Multipath TCP takes the mark, tcpdump agrees${
    mptcp < 0 ? " (skipped: the kernel has none)" : ""
  }`,
  ignore: mptcp < 0 || missing(["root", "tcpdump"]).length > 0,
  async fn() {
    using listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
    await using capture = await Capture.start(listener.addr.port);
    const fd = socket(AF_INET, 1, IPPROTO_MPTCP), remote = encode(listener.addr);
    assert.equal(startConnect(fd, remote), -EINPROGRESS);
    using server = await listener.accept();
    const localAddr = server.remoteAddr, conn = { localAddr, remoteAddr: listener.addr };
    assert.deepEqual([fdOf(conn), setTos(conn, 0xb8), getTos(conn)], [fd, 0xb8, 0xb8]);
    watchSent(conn);
    assert.equal(libcSend(fd, new Uint8Array(10), 0), 10);
    const seen = await capture.until((all) => all.some(({ length }) => length > 0));
    assert.equal(seen.find(({ length }) => length > 0)!.tos, 0xb8);
    close(fd);
  },
});
