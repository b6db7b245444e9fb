import assert from "node:assert/strict";
import { Background, execute, succeed, testWith } from "../support/processes.ts";
import { BUILT, byHand } from "./hand.ts";
import { SCENES } from "./lab.ts";
import { until, within } from "../support/waiting.ts";
import type { Scene } from "./scene.ts";
import { presentOf, Site } from "./site.ts";

const NEEDS = ["root", "ip", "tc", "nft", "sysctl", "bash"];
const LAB = [Deno.execPath(), "run", "--allow-all", new URL("lab.ts", import.meta.url).pathname];
/** The names of namespaces that no other run has. */
const PREFIX = `t${Deno.pid}`;

/** Removes the network of a scene when disposed of, if it stands. */
function removing({ wiring: { hosts } }: Scene): AsyncDisposable {
  const names = hosts.map((host) => `${PREFIX}-${host}`);
  return {
    async [Symbol.asyncDispose]() {
      for (const host of await presentOf(names)) await host[Symbol.asyncDispose]();
    },
  };
}

/** The lines of a text by hand that build the network. */
function buildingOf(text: string): string {
  const [, building] = new RegExp(`^${BUILT}\\n(.*?)\\n\\n`, "ms").exec(text) ?? [];
  assert.ok(building !== undefined, text);
  return building;
}

/** What a network is: addresses, routes, queues, rules and settings, host by host. */
async function describeNetwork({ wiring: { hosts } }: Scene): Promise<string> {
  const questions = [
    "ip -br addr show",
    "ip route show",
    "ip -6 route show",
    "tc qdisc show",
    ...["r0", "r1"].flatMap((device) => [
      `tc class show dev ${device}`,
      `tc filter show dev ${device}`,
    ]),
    "nft list ruleset",
    "sysctl net.ipv4.ip_forward net.ipv6.conf.all.forwarding net.ipv4.icmp_ratelimit",
  ];
  let text = "";
  for (const host of hosts) {
    for (const question of questions) {
      const words = ["ip", "netns", "exec", `${PREFIX}-${host}`, ...question.split(" ")];
      text += `${question}\n${(await execute(words)).stdout}`;
    }
  }
  // What comes by chance or a moment later: MAC addresses and what is made of them, carriers, counts.
  const passing =
    / ?fe80::[0-9a-f:]+\/\d+|^fe80.*\n|@if\d+|direct_packets_stat \d+| linkdown| (UP|DOWN|UNKNOWN)\b| +$/gm;
  return text.replace(passing, "").replace(/ {2,}/g, " ");
}

testWith(NEEDS, "the commands that a scene prints build the network that they built", async () => {
  for (const scene of SCENES) {
    await using _network = removing(scene);
    let built: string, text: string;
    {
      await using site = await Site.build(scene.wiring, scene.commands, PREFIX);
      built = await describeNetwork(scene);
      text = byHand(scene, site.log, PREFIX);
    }
    await succeed("bash", "-ec", buildingOf(text));
    assert.equal(await describeNetwork(scene), built, scene.name);
    assert.ok(built.length > 500, built);
  }
});

/** The figures of a scene in what the lab has printed: of a table, or of the sentences below it. */
const FIGURES: Record<string, (said: string) => unknown> = {
  rewrite: (said) => /^The 64 code points[^]*?as DF\.$/m.exec(said)?.[0],
  path: (said) =>
    /^EF .* was changed to CS1 .*between\nr1 and r2\.|^EF .* between r1.*$/m.exec(said)?.[0],
  tos: (said) => said.match(/^EF gains nothing|^ToS 0x10, .* goes into the first band/gm),
  drop: (said) => said.match(/^-d .*\.$/gm),
};

for (const [name, figuresOf] of Object.entries(FIGURES)) {
  testWith(
    [...NEEDS, "setpriv"],
    `${name}: built by hand, after --remove, its network gives the same figures`,
    async () => {
      const scene = SCENES.find((scene) => scene.name === name)!;
      await using _network = removing(scene);
      const lab = (...args: string[]) => execute([...LAB, ...args, "--name", PREFIX]);
      const kept = await lab("--scene", name, "--keep");
      assert.equal(kept.code, 0, kept.stderr);
      const figures = figuresOf(kept.stdout);
      assert.ok(figures, kept.stdout);
      const hosts = scene.wiring.hosts.map((host) => `${PREFIX}-${host}`);
      assert.equal((await presentOf(hosts)).length, hosts.length);
      const removed = await lab("--remove");
      assert.equal(removed.code, 0, removed.stderr);
      const names = /^removed (.*)\n$/.exec(removed.stdout)?.[1].split(", ");
      assert.deepEqual(names?.toSorted(), hosts.toSorted(), removed.stdout);
      assert.equal((await presentOf(hosts)).length, 0);
      await succeed("bash", "-ec", buildingOf(kept.stdout));
      const again = await lab("--scene", name, "--again");
      assert.equal(again.code, 0, again.stderr);
      assert.deepEqual(figuresOf(again.stdout), figures);
      assert.ok(!again.stdout.includes(BUILT), again.stdout);
      assert.equal((await presentOf(hosts)).length, hosts.length);
    },
  );
}

testWith(NEEDS, "what a scene prints to look and to try runs as it is, in one paste", async () => {
  const scene = SCENES.find(({ name }) => name === "rewrite")!;
  await using _network = removing(scene);
  await using site = await Site.build(scene.wiring, scene.commands, PREFIX);
  const text = byHand(scene, site.log, PREFIX);
  const tries = text.slice(text.indexOf("# To try"), text.indexOf("# To measure"));
  await using shell = new Background(["bash", "-c", `${tries}\nkill $!`]);
  await within(shell.end(), () => `the end of ${shell.said}`, 60);
  const arrived = shell.said.split("\n").filter((line) => line.startsWith("arrived"));
  assert.equal(arrived.length, 3, shell.said);
  for (const [at, byte] of ["0xB8", "0x00", "0x20"].entries()) {
    assert.ok(arrived[at].includes(byte), shell.said);
  }
});

testWith(NEEDS, "--keep, --again and --remove say what keeps them from it", async () => {
  const scene = SCENES.find(({ name }) => name === "rewrite")!;
  await using _network = removing(scene);
  const lab = (...args: string[]) =>
    execute([...LAB, "--scene", "rewrite", ...args, "--name", PREFIX]);
  const absent = await lab("--again");
  assert.deepEqual([absent.code, absent.stderr], [
    2,
    `lab: no namespace ${PREFIX}-client: --keep builds the network\n`,
  ]);
  const nothing = await lab("--remove");
  assert.deepEqual([nothing.code, nothing.stdout], [
    0,
    `nothing to remove: no namespace ${PREFIX}-…\n`,
  ]);
  await using site = await Site.build(scene.wiring, scene.commands, PREFIX);
  const present = await lab("--keep");
  assert.deepEqual([present.code, present.stderr], [
    2,
    `lab: the namespace ${PREFIX}-client is there already: --again measures in it, ` +
    "--remove removes it\n",
  ]);
  const hosts = site.hosts.map(({ name }) => name);
  assert.equal((await presentOf(hosts)).length, 3);
  const other = await execute([...LAB, "--scene", "drop", "--again", "--name", PREFIX]);
  assert.equal(other.code, 2);
  assert.match(other.stderr, /^lab: the network that stands is not that of 'drop': [^\n]+\n$/m);
  await using _program = new Background([...site.at.server.under, "sleep", "60"]);
  const used = await lab("--again");
  assert.deepEqual([used.code, used.stderr], [
    2,
    `lab: programs run in ${PREFIX}-server; to end them: ip netns pids ${PREFIX}-server | ` +
    "xargs kill\n",
  ]);
});

for (const signal of ["SIGINT", "SIGKILL"] as const) {
  testWith(NEEDS, `${signal} before --keep has measured leaves nothing behind`, async () => {
    const scene = SCENES.find(({ name }) => name === "tos")!;
    await using _network = removing(scene);
    const words = [...LAB, "--scene", "tos", "--keep", "--name", PREFIX];
    await using lab = new Background(words);
    await lab.until((said) => said.includes("with three marks"));
    const hosts = scene.wiring.hosts.map((host) => `${PREFIX}-${host}`);
    assert.equal((await presentOf(hosts)).length, 3);
    await lab.stop(signal);
    const isGone = async () => (await presentOf(hosts)).length === 0;
    await until(isGone, "the namespaces to go");
  });
}
