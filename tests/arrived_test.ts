import assert from "node:assert/strict";
import { parseSyn } from "../ffi/arrived.ts";
import { parseControl } from "../ffi/sockaddr.ts";
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
    json: bytesOnly(JSON.parse(outcome.stdout)),
    sent: await bytes(near),
    arrived: await bytes(far),
  };
}

/** A line of JSON with the bytes alone of what arrived. */
function bytesOnly(json: ReturnType<typeof JSON.parse>) {
  const { syn, ack, data } = json.arrived ?? {};
  return { ...json, arrived: json.arrived && { syn, ack, data } };
}

for (const [version, host] of [["ip", SERVER.ipv4], ["ip6", `[${SERVER.ipv6}]`]]) {
  const told = (tos: number) => ({ syn: tos, ack: null, data: tos });

  testWith(NEEDS, `a mark that survives the path is told so: ${version}`, async () => {
    await using network = await Network.create();
    const { code, stderr, json, sent, arrived } = await across(network, host, "--mark-syn");
    assert.equal(code, 0, stderr);
    assert.deepEqual(json.arrived, told(0xb8));
    assert.deepEqual([...new Set(sent)], [0xb8]);
    assert.deepEqual([...new Set(arrived)], [0xb8]);
    assert.equal(json.reply.tos, 0xb8);
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
      assert.match(stderr, /^dscp-get: sent EF \(0xB8\), arrived DF \(0x00\): the path rewrote it/);
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
  "without --mark-syn the request shows what the path does, on IPv4 as on IPv6",
  async () => {
    await using network = await Network.create();
    await network.router.run(
      "nft",
      "add table inet q; add chain inet q f { type filter hook forward priority mangle; }",
    );
    const ipv4 = await across(network, SERVER.ipv4);
    assert.deepEqual([ipv4.code, ipv4.json.arrived], [0, { syn: 0, ack: null, data: 0xb8 }]);
    const ipv6 = await across(network, `[${SERVER.ipv6}]`);
    assert.deepEqual([ipv6.code, ipv6.json.arrived], [0, { syn: 0, ack: null, data: 0xb8 }]);
    for (const [version, host] of [["ip", SERVER.ipv4], ["ip6", `[${SERVER.ipv6}]`]]) {
      const rule = `add rule inet q f iifname r0 ${version} dscp ef ${version} dscp set cs0`;
      await network.router.run("nft", rule);
      const cleared = await across(network, host);
      assert.deepEqual([cleared.code, cleared.json.arrived.data], [102, 0]);
    }
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
    const { arrived, mark, reply } = bytesOnly(JSON.parse(stdout));
    assert.deepEqual(arrived, { syn: null, ack: 0x88, data: null });
    assert.deepEqual(reply.headers.find(([name]: string[]) => name === "arrived-tos")[1], "0x88");
    assert.equal(mark.handshakeProved, null, "nobody saw the SYN");
    const answer = (await capture.connection()).find(({ from, length }) =>
      from === 8086 && length > 0
    );
    assert.equal(answer?.tos, 0x88);
    const report = (await dscpGet(["--mark-syn", url], network.client)).stderr;
    assert.match(report, /^arrived +ACK 0xB8: the mark survived on the handshake$/m);

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
  ["root", "ip", "socat"],
  "a proxy in between is another connection: that is said, and nothing is held against the path",
  async () => {
    await using network = await Network.create();
    const { client, router, server } = network;
    await using _server = await FarEnd.start("[::]:8086", server.under);
    const words = `socat -d -d TCP4-LISTEN:8087,fork,reuseaddr TCP4:${SERVER.ipv4}:8086`.split(" ");
    await using proxy = new Background([...router.under, ...words]);
    await proxy.until((said) => said.includes("listening on"));
    const url = "http://192.0.2.1:8087/";
    const { code, stderr } = await dscpGet(["--mark-syn", url], client);
    assert.equal(code, 0, stderr);
    assert.match(
      stderr,
      /^arrived +request 0x00, SYN 0x00 on another connection: a proxy/m,
    );
    const required = await dscpGet(["-s", "--require-proof", url], client);
    assert.equal(required.code, 104, required.stderr);
    const { arrived, mark } = JSON.parse(
      (await dscpGet(["--json", "--mark-syn", url], client)).stdout,
    );
    assert.deepEqual([arrived, mark.handshakeProved], [null, null]);
  },
);

for (const [version, host] of [["ip", SERVER.ipv4], ["ip6", `[${SERVER.ipv6}]`]]) {
  testWith(
    ["root", "ip", "nft", "tcpdump"],
    `behind NAT the server knows the client's sequence number, and the verdict stands: ${version}`,
    async () => {
      await using network = await Network.create();
      const { router } = network;
      const chain = "{ type nat hook postrouting priority srcnat; }";
      await router.run("nft", `add table ${version} n; add chain ${version} n p ${chain}`);
      await router.run("nft", `add rule ${version} n p oifname r1 masquerade`);
      const kept = await across(network, host);
      assert.equal(kept.code, 0, kept.stderr);
      assert.deepEqual(kept.json.arrived, { syn: 0, ack: null, data: 0xb8 });
      const peer = kept.json.reply.headers.find(([name]: string[]) => name === "arrived-peer")[1];
      assert.ok(!peer.startsWith(kept.json.local.address), "the server sees another address");
      const hook = "{ type filter hook forward priority mangle; }";
      await router.run("nft", `add chain ${version} n f ${hook}`);
      await router.run(
        "nft",
        `add rule ${version} n f iifname r0 ${version} dscp ef ${version} dscp set cs0`,
      );
      const cleared = await across(network, host);
      assert.equal(cleared.code, 102, cleared.stderr);
      assert.deepEqual(cleared.json.arrived, { syn: 0, ack: null, data: 0 });
    },
  );
}

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

Deno.test("the report says what the server reports, and what that is worth", async () => {
  await using server = await FarEnd.start("[::]:0");
  const line = async (...args: string[]) =>
    /^arrived +((?:.|\n )*)$/m.exec((await dscpGet(args)).stderr)![1].replace(/\s+/g, " ");
  for (const host of ["127.0.0.1", "[::1]"]) {
    const url = `http://${host}:${server.port}/`;
    assert.match(await line("--mark-syn", url), /^request 0xB8, SYN 0xB8: the mark survived$/);
    assert.match(await line(url), /^request 0xB8: the mark survived; SYN 0x00, as it was sent/);
  }
  await using liar = replying("HTTP/1.1 200 OK\r\nArrived-SYN: 0x20\r\nContent-Length: 0\r\n\r\n");
  assert.match(await line("--mark-syn", liar.url), /^SYN 0x20: NOT the mark that was sent$/);
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
    assert.deepEqual(
      [outcome.code, bytesOnly(JSON.parse(outcome.stdout)).arrived],
      [code, arrived],
      headers,
    );
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
    assert.match(
      stderr,
      /^dscp-get: SYN sent DF \(0x00\), arrived AF41 \(0x88\), but the request kept its mark: /m,
    );
    assert.match(stderr, /^arrived +request 0xB8, SYN 0x88: NOT the mark that was sent$/m);
    const series = await dscpGet(["-n", "2", "-d", "AF41", url], network.client);
    assert.equal(series.code, 102);
    assert.match(series.stdout, /^AF41 +0x88 +0x88 SYN 0x88 ! +2 +0 +2 /m);
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
    assert.deepEqual(json.arrived, { syn: 0x00, ack: null, data: 0xb8 });
    assert.equal(code, 0, stderr);
  },
);
