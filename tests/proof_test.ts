import assert from "node:assert/strict";
import { Namespace } from "./support/namespaces.ts";
import { Capture } from "./support/packets.ts";
import { dscpGet, execute, Nobody, testWith } from "./support/processes.ts";
import { OK, replying, replyingOn, startPython } from "./support/servers.ts";

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
      assert.equal(result.left.proved, true);
      const fromClient = (await capture.connection()).filter(({ to }) => to === server.port);
      const [syn, ack, ...rest] = fromClient;
      assert.deepEqual([syn.flags, syn.tos, ack.flags, ack.tos], ["S", 0, ".", 0]);
      assert.equal(result.mark.handshake, false);
      assert.ok(
        rest.some(({ flags }) => flags.includes("P")) &&
          rest.some(({ flags }) => flags.includes("F")),
      );
      assert.deepEqual(rest.map(({ tos }) => tos), rest.map(() => 0xb8));
      assert.deepEqual(result.left.packets.map(({ tos }: { tos: number }) => tos), [0xb8]);
      const header = host === "[::1]" ? 40 : 20;
      const data = rest.find(({ length }) => length > 0)!;
      // 32 bytes of TCP header: 20 and the timestamps option.
      assert.equal(result.left.packets[0].length, header + 32 + data.length);
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
      assert.deepEqual(JSON.parse(stdout).left.packets.map((p: { tos: number }) => p.tos), [tos]);
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
    await namespace.run(
      "nft",
      "add table ip mangle; add chain ip mangle out { type route hook output priority mangle; }",
    );
    await namespace.run("nft", "add rule ip mangle out ip dscp ef ip dscp set cs1");
    await using capture = await Capture.start(8086, "lo", namespace.under);
    const { code, stdout, stderr } = await dscpGet([], namespace);
    assert.equal(code, 101);
    assert.match(stderr, /reads back 0xB8/);
    assert.match(
      stderr,
      /^dscp-get: set 0xB8, left with 0x20: something on this host, such as nftables, rewrote it$/m,
    );
    assert.match(stdout, /built-in server/);
    const sent = (await capture.connection()).filter(({ to, length }) => to === 8086 && length > 0);
    assert.deepEqual(sent.map(({ tos }) => tos), [0x20]);

    const { left, error } = JSON.parse((await dscpGet(["--json"], namespace)).stdout);
    assert.deepEqual([left.proved, left.packets[0].tos, error.code], [false, 0x20, 101]);

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
    const { left } = JSON.parse(stdout);
    assert.deepEqual([left.proved, left.packets[0].tos], [true, 0xba]);
    const sent = (await capture.connection()).filter(({ to, length }) => to === 8086 && length > 0);
    assert.deepEqual(sent.map(({ tos }) => tos), [0xba]);
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
    assert.deepEqual([oneEnd.code, JSON.parse(oneEnd.stdout).left.proved], [0, true]);

    await namespace.run("nft", "add chain ip nat post { type nat hook postrouting priority 100; }");
    await namespace.run("nft", "add rule ip nat post tcp dport 8086 snat to 127.0.0.3");
    const bothEnds = await dscpGet(["--json", "http://127.0.0.2:8086/"], namespace);
    assert.equal(bothEnds.code, 0, bothEnds.stderr);
    assert.deepEqual(JSON.parse(bothEnds.stdout).left, { proved: null, packets: [] });
    assert.match(
      (await dscpGet(["http://127.0.0.2:8086/"], namespace)).stderr,
      /^left +not observed/m,
    );
  },
);

testWith(["root", "setpriv"], "nobody gets the same proof as root", async () => {
  await using nobody = await Nobody.create();
  await using server = replying(OK);
  const { code, stdout, stderr } = await execute([...nobody.command, "--json", server.url]);
  assert.equal(code, 0, stderr);
  assert.deepEqual(JSON.parse(stdout).left.packets.map((p: { tos: number }) => p.tos), [0xb8]);
});
