import assert from "node:assert/strict";
import { parseDscp } from "../ffi/mod.ts";
import { CLEARED, rewrite } from "./lab.ts";
import { Network } from "./support/namespaces.ts";
import { Capture, type Seen } from "./support/packets.ts";
import { Background, execute, testWith } from "./support/processes.ts";

const NEEDS = ["root", "ip", "tc", "nft", "sysctl", "tcpdump"];
const LAB = [Deno.execPath(), "run", "--allow-all", new URL("lab.ts", import.meta.url).pathname];

async function namespacesOf(pid: number): Promise<string[]> {
  const { stdout } = await execute(["ip", "netns", "list"]);
  return stdout.split("\n").filter((line) => line.startsWith(`dscp-get-${pid}-`));
}

testWith(
  NEEDS,
  "the rewrite scene names each code point that the router clears, and no other; tcpdump agrees",
  async () => {
    await using network = await Network.create();
    await using far = await Capture.start(8086, "s0", network.server.under);
    await using near = await Capture.start(8086, "c0", network.client.under);
    const changed = await rewrite(network);
    const expected = new Map(CLEARED.map((name) => [parseDscp(name).dscp, 0]));
    assert.deepEqual([...changed].sort(), [...expected].sort());
    const syns = async (capture: Capture) => {
      const of = (packets: Seen[]) => packets.filter(({ flags }) => flags === "S");
      const packets = await capture.until((packets) => of(packets).length >= 64);
      return new Map(of(packets).map(({ from, tos }) => [from, tos >> 2]));
    };
    const [sent, arrived] = [await syns(near), await syns(far)];
    assert.equal(sent.size, 64);
    for (const [port, dscp] of sent) assert.equal(arrived.get(port), changed.get(dscp) ?? dscp);
  },
);

testWith(NEEDS, "the lab shows its four ways, draws them, and leaves nothing behind", async () => {
  const file = await Deno.makeTempFile({ suffix: ".svg" });
  await using lab = new Background([...LAB, "--svg", file]);
  const { code } = await lab.child.status;
  assert.equal(code, 0, lab.said);
  for (const label of ["idle, DF", "busy, DF", "busy, EF", "busy, EF, --mark-syn"]) {
    assert.match(lab.said, new RegExp(`^${label} +25( +[\\d.]+){3} +█+$`, "m"));
    assert.match(lab.said, new RegExp(`^${label}: [A-Z]`, "m"));
  }
  assert.match(lab.said, /^busy, EF, --mark-syn: .*Mann–Whitney U, p = /m);
  assert.match(await Deno.readTextFile(file), /^<svg [^]*prefers-color-scheme: dark[^]*<\/svg>\n$/);
  assert.deepEqual(await namespacesOf(lab.child.pid), []);
  await Deno.remove(file);
});

testWith(NEEDS, "Ctrl-C in the lab leaves no namespace and no process behind", async () => {
  await using lab = new Background(LAB);
  while ((await namespacesOf(lab.child.pid)).length < 3) {
    await new Promise((resolve) => setImmediate(resolve));
  }
  const { code } = await lab.stop("SIGINT");
  assert.equal(code, 130, lab.said);
  assert.deepEqual(await namespacesOf(lab.child.pid), []);
});

testWith(
  ["root", "ip", "nft", "sysctl", "setpriv"],
  "the path scene shows the rewrite as root and as nobody, and leaves nothing behind",
  async () => {
    await using lab = new Background([...LAB, "--scene", "path"]);
    const { code } = await lab.child.status;
    assert.equal(code, 0, lab.said);
    const runs = lab.said.split(/^(?=root|nobody)/m);
    assert.equal(runs.length, 4, lab.said);
    for (const at of [0, 2]) {
      assert.match(runs[at], /^ {2}2 {2}\S+ +[\d.]+ {2}CS1 \(0x20\) {3}changed$/m);
      assert.match(runs[at], /^EF \(0xB8\) was changed to CS1 \(0x20\) between hop 1 /m);
    }
    assert.match(runs[1], /^Between hop 1 \(.*\) and hop 2 \(.*\): EF → CS1$/m);
    assert.match(runs[3], /^ {2}1 {2}\S+ +[\d.]+ {2}lower bits kept$/m);
    assert.deepEqual(await namespacesOf(lab.child.pid), []);
  },
);

Deno.test("an unknown scene is told what there is", async () => {
  const { code, stdout } = await execute([...LAB, "--scene", "moon"]);
  assert.deepEqual([code, stdout], [
    2,
    "lab: --scene is one of bottleneck, rewrite, pfifo, path\n",
  ]);
});
