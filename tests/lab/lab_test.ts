import assert from "node:assert/strict";
import { parseDscp } from "../../ffi/mod.ts";
import type { Row } from "../../src/series.ts";
import { quantile } from "../../src/statistics.ts";
import { Capture, type Seen } from "../support/packets.ts";
import { Background, execute, testWith } from "../support/processes.ts";
import { until } from "../support/waiting.ts";
import { ARRIVAL, DROP, measureArrival, measureDrop, showArrival, showDrop } from "./arrival.ts";
import { SCENES } from "./lab.ts";
import { measurePolicing, measureShaping, POLICING, SHAPING, showPolicing } from "./limits.ts";
import { CLEARED, measurePath, measureRewrite, PATH, REWRITE } from "./marks.ts";
import {
  CALL,
  measureCall,
  measurePriority,
  measureTos,
  phasesOf,
  PRIORITY,
  showCall,
  showPriority,
  showTos,
  TOS,
} from "./queuing.ts";

const NEEDS = ["root", "ip", "tc", "nft", "sysctl"];
const LAB = [Deno.execPath(), "run", "--allow-all", new URL("lab.ts", import.meta.url).pathname];

const medianOf = ({ total }: Row) => quantile(total, 0.5);

// ─── Networks: what the sentences say of them is so ──────────────────────────────────────────────

testWith(
  NEEDS,
  "priority: EF from the SYN on is 20 times faster than DF on a busy link",
  async () => {
    await using network = await PRIORITY.build();
    const measured = await measurePriority(network, {}, { ticks: 15, every: 80 });
    const [idle, df, , syn] = measured.rows;
    assert.ok(medianOf(df) >= 20 * medianOf(syn), showPriority(measured).table);
    assert.ok(medianOf(df) >= 20 * medianOf(idle), showPriority(measured).table);
    assert.deepEqual([[...syn.sent], [...syn.arrived]], [[0xb8], [0xb8]]);
  },
);

testWith(NEEDS, "call: the download slows DF, and EF at most 5 times", async () => {
  await using network = await CALL.build();
  const call = await measureCall(network, {}, { seconds: 4.5, from: 1.5, to: 3.5 });
  const [df, ef] = phasesOf(call).map(({ rows }) => rows.map(medianOf));
  assert.ok(ef[1] <= 5 * ef[0], showCall(call).table);
  assert.ok(df[1] >= 5 * df[0], showCall(call).table);
  const busiest = Math.max(...call.load.map(([, mbits]) => mbits));
  assert.ok(busiest > 3 && call.load.some(([, mbits]) => mbits < 1), `${call.load}`);
});

testWith(NEEDS, "shaping: packets wait in a queue, and none is dropped", async () => {
  await using network = await SHAPING.build();
  const [free, shaped] = await measureShaping(network, {}, { kilobytes: 200, seconds: 1.5 });
  assert.deepEqual([free.drops, free.queue.packets, shaped.drops], [0, 0, 0]);
  assert.ok(shaped.queue.packets > 10 && shaped.queue.bytes > 10_000, `${shaped.queue.packets}`);
  // 200 kB at 2 Mbit/s are 0.8 s.
  assert.ok(shaped.reply.milliseconds > 700, `${shaped.reply.milliseconds}`);
  assert.ok(free.reply.milliseconds < shaped.reply.milliseconds);
});

testWith(NEEDS, "policing: packets are dropped and sent again, and none waits", async () => {
  await using network = await POLICING.build();
  // What somebody has sent before is not counted.
  await network.apply([
    ["router", "nft flush chain ip police f"],
    [
      "router",
      "nft add rule ip police f oifname r0 limit rate over 166/second burst 16 packets " +
      "counter packets 1000 bytes 1000 drop",
    ],
  ]);
  const [shaped, policed] = await measurePolicing(network, {}, { kilobytes: 200, seconds: 1.5 });
  assert.equal(shaped.drops, 0);
  assert.ok(
    policed.drops > 10 && policed.drops < 1000 && policed.resent > 10,
    `${policed.drops}, ${policed.resent}`,
  );
  assert.equal(policed.queue.packets, 0);
  assert.ok(medianOf(policed.row) < medianOf(shaped.row), showPolicing([shaped, policed]).table);
});

testWith(NEEDS, "tos: pfifo_fast treats EF as DF, and ToS 0x10 better", async () => {
  await using network = await TOS.build();
  const measured = await measureTos(network, {}, { ticks: 15, every: 80 });
  const [df, ef, low] = measured.rows.map(medianOf);
  assert.ok(ef > df / 5 && low < df / 5, showTos(measured).table);
});

testWith(
  [...NEEDS, "tcpdump"],
  "rewrite: it names each code point that the router clears, and no other; tcpdump agrees",
  async () => {
    await using network = await REWRITE.build();
    await using far = await Capture.start(8086, "s0", network.at.server.under);
    await using near = await Capture.start(8086, "c0", network.at.client.under);
    const arrived = await measureRewrite(network);
    const cleared = new Set(CLEARED.map((name) => parseDscp(name).dscp));
    const expected = Array.from({ length: 64 }, (_, dscp) => [dscp, cleared.has(dscp) ? 0 : dscp]);
    assert.deepEqual([...arrived], expected);
    const syns = async (capture: Capture) => {
      const of = (packets: Seen[]) => packets.filter(({ flags }) => flags === "S");
      const packets = await capture.until((packets) => of(packets).length >= 64);
      return new Map(of(packets).map(({ from, tos }) => [from, tos >> 2]));
    };
    const [sent, seen] = [await syns(near), await syns(far)];
    assert.equal(sent.size, 64);
    for (const [port, dscp] of sent) assert.equal(seen.get(port), arrived.get(dscp));
  },
);

testWith([...NEEDS, "setpriv"], "path: EF changes between the two routers", async () => {
  await using network = await PATH.build();
  const trace = await measurePath(network);
  assert.deepEqual(trace.changed, { after: 1, at: 2, from: 0xb8, to: 0x20 });
  assert.equal(trace.runs.length, 3);
});

testWith(NEEDS, "arrival: NAT leaves the mark alone, and the router clears it", async () => {
  await using network = await ARRIVAL.build();
  const arrivals = await measureArrival(network), { runs, log } = arrivals;
  const text = showArrival(arrivals).table;
  assert.deepEqual(runs.map(({ code }) => code), [0, 0, 102], text);
  const arrived = runs.map(({ json }) => json.arrived);
  assert.deepEqual(arrived.map((one) => one?.data), [0xb8, 0xb8, 0], text);
  assert.deepEqual(arrived.map((one) => one?.nat?.split(":")[0] ?? null), [
    null,
    "192.0.2.1",
    "192.0.2.1",
  ]);
  assert.match(runs[1].text, /through NAT: the server sees 192\.0\.2\.1:\d+$/m);
  assert.match(runs[2].text, /request 0x00: NOT the mark that was sent/);
  const peers = log.split("\n").map((line) => line.split(":")[0]);
  assert.deepEqual(peers, ["192.168.1.1", "192.0.2.1", "192.0.2.1"]);
});

testWith(
  NEEDS,
  "drop: DF passes, EF after the handshake gets no reply, EF on the SYN no connection",
  async () => {
    await using network = await DROP.build();
    const drops = await measureDrop(network), { runs, dropped } = drops;
    assert.deepEqual(runs.map(({ code }) => code), [0, 28, 28], showDrop(drops).table);
    const reached = runs.map(({ json: { milliseconds: { connect, firstByte } } }) =>
      [connect, firstByte].filter((one) => one !== null).length
    );
    assert.deepEqual(reached, [2, 1, 0]);
    // Each of two runs with EF sends its request more than once, and two others their SYN.
    assert.ok(dropped >= 6, `${dropped}`);
    // What was dropped before is not counted again.
    const again = await measureDrop(network);
    assert.ok(again.dropped < dropped + 6, `${again.dropped}`);
  },
);

// ─── The program ─────────────────────────────────────────────────────────────────────────────────

async function namespacesOf(pid: number): Promise<string[]> {
  const { stdout } = await execute(["ip", "netns", "list"]);
  return stdout.split("\n").map((line) => line.split(" ")[0])
    .filter((name) => name.startsWith(`dscp-get-${pid}-`));
}

testWith(
  NEEDS,
  "a scene prints its parts, writes both files, and leaves nothing behind",
  async () => {
    const folder = await Deno.makeTempDir({ prefix: "dscp-get-lab-" });
    const svg = `${folder}/lab.svg`, html = `${folder}/lab.html`;
    await Deno.writeTextFile(svg, "x".repeat(1e6));
    const words = [...LAB, "--scene", "rewrite", "--svg", svg, `--html=${html}`];
    await using lab = new Background(words);
    const { code } = await lab.end();
    assert.equal(code, 0, lab.said);
    const parts = [
      "A DSCP is a request",
      "┤ router ├",
      "nft add table",
      "CS6→DF",
      "6 of 64 code points",
    ];
    const places = parts.map((part) => lab.said.indexOf(part));
    assert.deepEqual(places, places.toSorted((a, b) => a - b));
    assert.ok(places[0] >= 0, lab.said);
    assert.match(lab.said, /^rewrite: a GET with each of 64 code points$/m);
    for (const line of lab.said.split("\n")) assert.ok(line.length <= 80, line);
    assert.match(await Deno.readTextFile(svg), /<svg [^]*<\/svg>\n$/);
    assert.match(await Deno.readTextFile(html), /<section id="rewrite">[^]*<\/html>\n$/);
    assert.deepEqual(await namespacesOf(lab.child.pid), []);
    await Deno.remove(folder, { recursive: true });
  },
);

for (const [signal, exit] of [["SIGINT", 130], ["SIGKILL", 137]] as const) {
  testWith(NEEDS, `${signal} in the lab leaves no namespace and no process behind`, async () => {
    const folder = await Deno.makeTempDir({ prefix: "dscp-get-lab-" });
    await using lab = new Background([...LAB, "--scene", "tos", "--svg", `${folder}/svg`]);
    await lab.until((said) => said.includes("with three marks"));
    const namespaces = await namespacesOf(lab.child.pid);
    const pids: string[] = [];
    for (const name of namespaces) {
      const { stdout } = await execute(["ip", "netns", "pids", name]);
      pids.push(...stdout.trim().split("\n").filter((pid) => pid !== ""));
    }
    assert.ok(namespaces.length === 3 && pids.length >= 3, `${namespaces} ${pids}`);
    assert.equal((await lab.stop(signal)).code, exit, lab.said);
    assert.doesNotMatch(lab.said, /rror/);
    // After SIGKILL another process tidies up.
    const left = async () =>
      (await namespacesOf(lab.child.pid)).length + pids.filter(isRunning).length;
    await until(async () => await left() === 0, "the namespaces and processes to go");
    if (signal === "SIGINT") assert.deepEqual([...Deno.readDirSync(folder)], []);
    await Deno.remove(folder, { recursive: true });
  });
}

/** Whether a process runs: one that has ended may still wait for its parent. */
function isRunning(pid: string): boolean {
  try {
    return !/\) [ZX]/.test(Deno.readTextFileSync(`/proc/${pid}/stat`));
  } catch {
    return false;
  }
}

testWith(NEEDS, "Ctrl-C while the network is built leaves nothing behind", async () => {
  await using lab = new Background([...LAB, "--scene", "rewrite"]);
  await until(async () => (await namespacesOf(lab.child.pid)).length > 0, "a namespace");
  assert.equal((await lab.stop("SIGINT")).code, 130, lab.said);
  assert.deepEqual(await namespacesOf(lab.child.pid), []);
});

Deno.test("a file that cannot be written is one line and exit 23, before anything is measured", async () => {
  for (const option of ["--svg", "--html"]) {
    await using lab = new Background([...LAB, "--scene", "rewrite", option, "/nowhere/file"]);
    const { code } = await lab.end();
    await lab.stop();
    if (code === 103) continue; // without root it does not come that far
    assert.deepEqual([code, lab.said], [
      23,
      "lab: cannot write /nowhere/file: no such file or directory\n",
    ]);
  }
});

testWith(["root", "unshare"], "missing root or tools are named", async () => {
  const user = await execute(["unshare", "--user", ...LAB]);
  // Some systems forbid it.
  if (!user.stderr.startsWith("unshare:")) {
    assert.equal(user.code, 103, user.stderr);
    assert.equal(user.stderr, `lab: needs root; run it with sudo ${Deno.execPath()} task lab\n`);
  }
});

testWith([...NEEDS, "unshare", "mount"], "a missing program is named", async () => {
  const { stdout: tc } = await execute(["sh", "-c", "command -v tc"]);
  const hidden = `mount --bind /dev/null ${tc.trim()} && exec "$@"`;
  const words = ["unshare", "--mount", "sh", "-c", hidden, "sh", ...LAB];
  const { code, stderr, stdout } = await execute(words);
  assert.deepEqual([code, stdout], [103, ""], stderr);
  assert.match(stderr, /^lab: needs tc; on Debian: apt-get install [^\n]+\n$/);
});

Deno.test("--help and --list need no root; an unknown scene gets the list", async () => {
  const names = SCENES.map(({ name }) => name);
  const lab = async (...args: string[]) => await execute([...LAB, ...args]);
  for (const option of ["--help", "--list"]) {
    const { code, stdout } = await lab(option);
    assert.equal(code, 0);
    for (const name of names) assert.match(stdout, new RegExp(`^  ${name} +[A-Z]`, "m"));
    for (const line of stdout.split("\n")) assert.ok(line.length <= 80, line);
  }
  const { code, stderr } = await lab("--scene", "moon");
  assert.deepEqual(
    [code, stderr],
    [2, `lab: unknown scene 'moon': there are ${names.join(", ")}, and all\n`],
  );
  for (
    const [args, message] of [
      ["--moon", "unknown argument '--moon'"],
      ["x", "unknown argument 'x'"],
      ["--scene", "--scene needs a value"],
      ["--scene all --svg x", "--svg takes one scene: use --html for all of them"],
      ["--scene all --keep", "--keep takes one scene"],
      ["--keep --remove", "--keep and --remove exclude each other"],
      ["--name x", "--name goes with --keep, --again or --remove"],
      ["--keep --name 1x", "--name takes up to 31 letters, digits, _ and -, a letter first"],
    ]
  ) {
    const { code, stderr } = await lab(...args.split(" "));
    assert.deepEqual([code, stderr], [2, `lab: ${message}\n`]);
  }
});
