import assert from "node:assert/strict";
import { parseControl, parseSyn } from "../ffi/arrived.ts";
import { IP_TOS, IPV6_TCLASS } from "../ffi/libc.ts";
import { Network, SERVER } from "./support/namespaces.ts";
import { Capture, fromHex } from "./support/packets.ts";
import { Background, dscpGet, type Outcome, testWith } from "./support/processes.ts";
import { Random } from "./support/random.ts";
import { FarEnd, RawServer, readRequest, replying, send } from "./support/servers.ts";

const NEEDS = ["root", "ip", "nft", "tcpdump"];

/** Runs the script across the network, with tcpdump at both ends. */
async function across(
  network: Network,
  host: string,
  ...args: string[]
): Promise<Outcome & { sent: number[]; arrived: number[]; json: ReturnType<typeof JSON.parse> }> {
  await using server = await FarEnd.start("[::]:8086", network.server.under);
  await using near = await Capture.start(8086, "c0", network.client.under);
  await using far = await Capture.start(8086, "s0", network.server.under);
  const outcome = await dscpGet(["--json", ...args, `http://${host}:8086/`], network.client);
  const bytes = async (capture: Capture) =>
    (await capture.connection()).filter(({ to }) => to === 8086).map(({ tos }) => tos);
  await server.process.until((said) => said.includes(" 200 "));
  return {
    ...outcome,
    json: JSON.parse(outcome.stdout),
    sent: await bytes(near),
    arrived: await bytes(far),
  };
}

for (const [version, host] of [["ip", SERVER.ipv4], ["ip6", `[${SERVER.ipv6}]`]]) {
  const isIPv6 = version === "ip6";
  const told = (tos: number) => ({ syn: tos, ack: isIPv6 ? null : tos, data: isIPv6 ? tos : null });

  testWith(NEEDS, `a mark that survives the path is told so: ${version}`, async () => {
    await using network = await Network.create();
    const { code, stderr, json, sent, arrived } = await across(network, host, "--mark-syn");
    assert.equal(code, 0, stderr);
    assert.deepEqual(json.arrived, told(0xb8));
    assert.deepEqual([...new Set(sent)], [0xb8]);
    assert.deepEqual([...new Set(arrived)], [0xb8]);
    assert.equal(json.reply.tos, isIPv6 ? 0xb8 : undefined);
  });

  testWith(
    NEEDS,
    `a router that clears the mark is found out, and both marks are named: 102: ${version}`,
    async () => {
      await using network = await Network.create();
      await network.router.run(
        "nft",
        "add table inet q; add chain inet q f { type filter hook forward priority mangle; }",
      );
      await network.router.run(
        "nft",
        `add rule inet q f iifname r0 ${version} dscp ef ${version} dscp set cs0`,
      );
      const { code, stderr, json, sent, arrived } = await across(network, host, "--mark-syn");
      assert.equal(code, 102);
      // On IPv6 the request's packet is reported, which was seen to leave as it should.
      const verdict = isIPv6 ? "the path rewrote it" : "rewritten by this host or the path";
      assert.equal(stderr, `dscp-get: sent EF (0xB8), arrived DF (0x00): ${verdict}\n`);
      assert.deepEqual([json.arrived, json.sent.proved, json.error.code], [told(0), true, 102]);
      assert.deepEqual([...new Set(sent)], [0xb8]);
      assert.deepEqual([...new Set(arrived)], [0]);
    },
  );

  testWith(NEEDS, `a router that remaps another mark leaves ours alone: ${version}`, async () => {
    await using network = await Network.create();
    await network.router.run(
      "nft",
      "add table inet q; add chain inet q f { type filter hook forward priority mangle; }",
    );
    await network.router.run(
      "nft",
      `add rule inet q f iifname r0 ${version} dscp af41 ${version} dscp set cs1`,
    );
    const ours = await across(network, host, "--mark-syn");
    assert.deepEqual([ours.code, ours.json.arrived], [0, told(0xb8)]);
    const other = await across(network, host, "--mark-syn", "-d", "AF41");
    assert.deepEqual([other.code, other.json.arrived], [102, told(0x20)]);
    assert.deepEqual([...new Set(other.arrived)], [0x20]);
  });
}

testWith(
  NEEDS,
  "without --mark-syn IPv4 shows the unmarked handshake only, IPv6 the data packet too",
  async () => {
    await using network = await Network.create();
    await network.router.run(
      "nft",
      "add table inet q; add chain inet q f { type filter hook forward priority mangle; }",
    );
    const ipv4 = await across(network, SERVER.ipv4);
    assert.deepEqual([ipv4.code, ipv4.json.arrived], [0, { syn: 0, ack: 0, data: null }]);
    const ipv6 = await across(network, `[${SERVER.ipv6}]`);
    assert.deepEqual([ipv6.code, ipv6.json.arrived], [0, { syn: 0, ack: null, data: 0xb8 }]);
    await network.router.run("nft", "add rule inet q f iifname r0 ip6 dscp ef ip6 dscp set cs0");
    const cleared = await across(network, `[${SERVER.ipv6}]`);
    assert.deepEqual([cleared.code, cleared.json.arrived.data], [102, 0]);
  },
);

testWith(
  ["root", "ip", "tcpdump"],
  "with SYN cookies the server knows the handshake's ACK alone: it reports and returns that mark",
  async () => {
    await using network = await Network.create();
    await network.server.run("sysctl", "-q", "-w", "net.ipv4.tcp_syncookies=2");
    await using _server = await FarEnd.start("[::]:8086", network.server.under);
    await using capture = await Capture.start(8086, "s0", network.server.under);
    const url = `http://${SERVER.ipv4}:8086/`;
    const args = ["--json", "--mark-syn", "-d", "AF41", url];
    const { code, stdout, stderr } = await dscpGet(args, network.client);
    assert.equal(code, 0, stderr);
    const { arrived, mark, reply } = JSON.parse(stdout);
    assert.deepEqual(arrived, { syn: null, ack: 0x88, data: null });
    assert.deepEqual(reply.headers.find(([name]: string[]) => name === "arrived-tos")[1], "0x88");
    assert.equal(mark.handshakeProved, null, "nobody saw the SYN");
    const answer = (await capture.connection()).find(({ from, length }) =>
      from === 8086 && length > 0
    );
    assert.equal(answer?.tos, 0x88);
    const report = (await dscpGet(["--mark-syn", url], network.client)).stderr;
    assert.match(report, /^arrived +ACK 0xB8 at the server: the mark survived on these packets$/m);

    const table = "add table ip q; add chain ip q f { type filter hook forward priority mangle; }";
    await network.router.run("nft", table);
    await network.router.run("nft", "add rule ip q f iifname r0 ip dscp ef ip dscp set cs1");
    const changed = await dscpGet(["--json", "--mark-syn", url], network.client);
    assert.deepEqual(
      [changed.code, JSON.parse(changed.stdout).mark.handshakeProved],
      [102, false],
    );
  },
);

testWith(
  ["root", "ip", "nft", "socat"],
  "a proxy or NAT in between is another connection: that is said, and nothing is held against the path",
  async () => {
    await using network = await Network.create();
    const { client, router, server } = network;
    await using _server = await FarEnd.start("[::]:8086", server.under);
    const socat = (words: string) =>
      new Background([...router.under, "socat", "-d", "-d", ...words.split(" ")]);
    await using proxy = socat(`TCP4-LISTEN:8087,fork,reuseaddr TCP4:${SERVER.ipv4}:8086`);
    await proxy.until((said) => said.includes("listening on"));
    const check = async (url: string, bytes: string) => {
      const { code, stderr } = await dscpGet(["--mark-syn", url], client);
      assert.equal(code, 0, stderr);
      const other =
        "reported by the server for another connection:\n {11}a proxy or NAT in between$";
      assert.match(stderr, new RegExp(`^arrived +${bytes}, ${other}`, "m"));
      assert.match(stderr, /^handshake +set before the SYN; not proved/m);
      const required = await dscpGet(["-s", "--require-proof", url], client);
      const message = "the far end reports what arrived on another connection: a proxy or NAT";
      assert.equal(required.code, 104);
      assert.ok(required.stderr.startsWith(`dscp-get: ${message}`), required.stderr);
      const { arrived, mark } = JSON.parse(
        (await dscpGet(["--json", "--mark-syn", url], client)).stdout,
      );
      assert.deepEqual([arrived, mark.handshakeProved], [null, null]);
    };
    await check("http://192.0.2.1:8087/", "SYN 0x00, ACK 0x00");
    // A router that translates addresses, and one that clears the mark as well.
    const url = `http://${SERVER.ipv4}:8086/`;
    const chain = "{ type nat hook postrouting priority srcnat; }";
    await router.run(
      "nft",
      `add table ip n; add chain ip n p ${chain}; add rule ip n p oifname r1 masquerade`,
    );
    await check(url, "SYN 0xB8, ACK 0xB8");
    await router.run("nft", "add chain ip n f { type filter hook forward priority mangle; }");
    await router.run("nft", "add rule ip n f iifname r0 ip dscp ef ip dscp set cs0");
    await check(url, "SYN 0x00, ACK 0x00");
  },
);

Deno.test("the peer that a server saw is ours in any notation of the same address, else another", async () => {
  const reply = (peer: string) =>
    `HTTP/1.1 200 OK\r\nArrived-SYN: 0x20\r\n${peer}Content-Length: 0\r\n\r\n`;
  for (
    const [host, peer, code] of [
      ["127.0.0.1", (port: number) => `Arrived-Peer: 127.0.0.1:${port}\r\n`, 102],
      ["[::ffff:127.0.0.1]", (port: number) => `Arrived-Peer: 127.0.0.1:${port}\r\n`, 102],
      ["127.0.0.1", () => "", 102],
      ["127.0.0.1", (port: number) => `Arrived-Peer: 127.0.0.1:${port ^ 1}\r\n`, 0],
      ["127.0.0.1", (port: number) => `Arrived-Peer: 127.0.0.2:${port}\r\n`, 0],
      ["127.0.0.1", () => "Arrived-Peer: \x1b[31m\r\n", 0],
    ] as const
  ) {
    await using server = new RawServer(async (conn) => {
      await readRequest(conn);
      await send(conn, reply(peer((conn.remoteAddr as Deno.NetAddr).port)));
    });
    const outcome = await dscpGet(["--mark-syn", `http://${host}:${server.port}/`]);
    assert.equal(outcome.code, code, outcome.stderr);
    assert.ok(!outcome.stderr.includes("\x1b"));
  }
});

Deno.test("the report says what the far end tells, and what that is worth", async () => {
  await using server = await FarEnd.start("[::]:0");
  const line = async (...args: string[]) =>
    /^arrived +(.*)$/m.exec((await dscpGet(args)).stderr)![1];
  const ipv4 = `http://127.0.0.1:${server.port}/`, ipv6 = `http://[::1]:${server.port}/`;
  assert.match(
    (await dscpGet([ipv4])).stderr,
    /^handshake +unmarked, as the server confirms \(0x00\); --mark-syn marks it too$/m,
  );
  assert.equal(
    await line("--mark-syn", ipv4),
    "SYN 0xB8, ACK 0xB8 at the server: the mark survived on these packets",
  );
  assert.equal(
    await line(ipv6),
    "SYN 0x00, data 0xB8 at the server: the mark survived the path",
  );
  // Of several packets with data the server knows the latest.
  const large = await dscpGet(["--mark-syn", "-H", `X-Pad: ${"x".repeat(100_000)}`, ipv6]);
  assert.match(large.stderr, /^arrived .* data 0xB8 at the server: .* survived on these packets$/m);
  await using liar = replying("HTTP/1.1 200 OK\r\nArrived-SYN: 0x20\r\nContent-Length: 0\r\n\r\n");
  assert.equal(
    await line("--mark-syn", liar.url),
    "SYN 0x20 at the server: NOT the mark that was sent",
  );
});

Deno.test("bytes of the wrong form are unknown, and so is Arrived-ToS alone", async () => {
  for (
    const [headers, arrived, code] of [
      ["Arrived-SYN: 0xB8\r\n", { syn: 0xb8, ack: null, data: null }, 0],
      ["Arrived-SYN: 0x20\r\n", { syn: 0x20, ack: null, data: null }, 102],
      ["Arrived-SYN: 0xBA\r\n", { syn: 0xba, ack: null, data: null }, 0],
      ["Arrived-SYN: 184\r\n", null, 0],
      ["Arrived-SYN: 0x1B8\r\n", null, 0],
      ["Arrived-SYN: \x1b[31m\r\n", null, 0],
      ["Arrived-ToS: 0x20\r\n", null, 0],
    ] as const
  ) {
    await using server = replying(`HTTP/1.1 200 OK\r\n${headers}Content-Length: 0\r\n\r\n`);
    const outcome = await dscpGet(["--json", "--mark-syn", server.url]);
    assert.deepEqual([outcome.code, JSON.parse(outcome.stdout).arrived], [code, arrived], headers);
  }
});

Deno.test("saved SYNs and control messages that are short, cut or random tell nothing", () => {
  assert.equal(parseSyn(Uint8Array.from([0x45, 0xb8, ...Array(18).fill(0)])), 0xb8);
  assert.equal(parseSyn(Uint8Array.from([0x6b, 0x80, ...Array(38).fill(0)])), 0xb8);
  assert.equal(parseSyn(new Uint8Array()), null);
  assert.equal(parseSyn(Uint8Array.from([0x45, 0xb8])), null);
  assert.equal(parseSyn(Uint8Array.from([0x6b, 0x80, ...Array(37).fill(0)])), null);
  assert.equal(parseSyn(Uint8Array.from([0x55, ...Array(60).fill(0)])), null);

  const message = fromHex("11000000 00000000 00000000 01000000 b8000000 00000000");
  assert.equal(parseControl(message, IP_TOS), 0xb8);
  assert.equal(parseControl(message, IPV6_TCLASS), null);
  assert.equal(parseControl(Uint8Array.from([...message, ...message]).subarray(24), IP_TOS), 0xb8);
  for (let size = 0; size < 17; size++) {
    assert.equal(parseControl(message.subarray(0, size), IP_TOS), null);
  }
  const random = new Random(3);
  const byte = () => random.below(256);
  for (let round = 0; round < 20_000; round++) {
    const bytes = Uint8Array.from({ length: byte() % 65 }, byte);
    assert.equal(
      parseControl(bytes, IP_TOS),
      null,
      "a length of eight random bytes is never a good one",
    );
  }
});

testWith(
  NEEDS,
  "an unmarked SYN that arrives marked is found out: 102, and --require-proof asks the far end too",
  async () => {
    await using network = await Network.create();
    await using _server = await FarEnd.start("0.0.0.0:8086", network.server.under);
    const url = `http://${SERVER.ipv4}:8086/`;
    const proved = await dscpGet(["--require-proof", url], network.client);
    assert.equal(proved.code, 0, proved.stderr);
    const chain = "add table ip q; add chain ip q f { type filter hook forward priority mangle; }";
    await network.router.run("nft", chain);
    await network.router.run(
      "nft",
      "add rule ip q f tcp flags & (syn|ack) == syn ip dscp set af41",
    );
    await using far = await Capture.start(8086, "s0", network.server.under);
    const { code, stderr } = await dscpGet([url], network.client);
    assert.equal(code, 102, stderr);
    assert.match(stderr, /^dscp-get: SYN sent DF \(0x00\), arrived AF41 \(0x88\): rewritten by /m);
    assert.match(stderr, /^handshake +sent unmarked, but SYN arrived with 0x88$/m);
    const series = await dscpGet(["-n", "2", "-d", "AF41", url], network.client);
    assert.equal(series.code, 102);
    assert.match(series.stdout, /^AF41 +0x88 +SYN 0x88 ! +2 +0 +2 /m);
    const [syn] = await far.connection();
    assert.equal(syn.tos, 0x88, "tcpdump agrees");
  },
);

testWith(
  [...NEEDS, "tc"],
  "a marked request that overtakes its unmarked ACK is no change by the path",
  async () => {
    await using network = await Network.create();
    const tc = (words: string) => network.router.run("tc", ...words.split(" "));
    await tc("qdisc add dev r1 root handle 1: htb default 20");
    await tc("class add dev r1 parent 1: classid 1:10 htb rate 100mbit");
    await tc("class add dev r1 parent 1: classid 1:20 htb rate 800bit burst 1 cburst 1");
    const isEf = "match ip dsfield 0xb8 0xfc flowid 1:10";
    await tc(`filter add dev r1 parent 1: protocol ip u32 ${isEf}`);
    const { code, stderr, json, arrived } = await across(network, SERVER.ipv4);
    // The SYN, and then not its ACK, which waits for most of a second.
    assert.deepEqual(arrived.slice(0, 2), [0x00, 0xb8]);
    assert.deepEqual(json.arrived, { syn: 0x00, ack: 0xb8, data: null });
    assert.equal(code, 0, stderr);
  },
);
