import assert from "node:assert/strict";
import { markOf, parseDscp } from "../../ffi/mod.ts";
import { Row } from "../../src/series.ts";
import { quantile } from "../../src/statistics.ts";
import { page, SCENES } from "./lab.ts";
import {
  measurePolicing,
  measureShaping,
  type Passage,
  showPolicing,
  showShaping,
} from "./limits.ts";
import {
  CLEARED,
  measurePath,
  measureRewrite,
  showPath,
  showRewrite,
  type Trace,
} from "./marks.ts";
import { Chain, Network } from "../support/namespaces.ts";
import { Capture, type Seen } from "../support/packets.ts";
import { drawSvg, drawTopology, duration, logScale } from "./plot.ts";
import { Background, execute, testWith } from "../support/processes.ts";
import {
  type Call,
  measureCall,
  measurePriority,
  measureTos,
  phasesOf,
  showCall,
  showPriority,
  showTos,
} from "./queuing.ts";
import type { Measured, Shown } from "./scene.ts";
import { until } from "../support/waiting.ts";

const NEEDS = ["root", "ip", "tc", "nft", "sysctl"];
const LAB = [Deno.execPath(), "run", "--allow-all", new URL("lab.ts", import.meta.url).pathname];

const medianOf = ({ total }: Row) => quantile(total, 0.5);

// ─── Networks: what the sentences say of them is so ──────────────────────────────────────────────

testWith(
  NEEDS,
  "priority: EF from the SYN on is 20 times faster than DF on a busy link",
  async () => {
    await using network = await Network.create();
    const measured = await measurePriority(network, {}, { ticks: 15, every: 80 });
    const [idle, df, , syn] = measured.rows;
    assert.ok(medianOf(df) >= 20 * medianOf(syn), showPriority(measured).table);
    assert.ok(medianOf(df) >= 20 * medianOf(idle), showPriority(measured).table);
    assert.deepEqual([[...syn.sent], [...syn.arrived]], [[0xb8], [0xb8]]);
  },
);

testWith(NEEDS, "call: the download slows DF, and EF at most 5 times", async () => {
  await using network = await Network.create();
  const call = await measureCall(network, {}, { seconds: 4.5, from: 1.5, to: 3.5 });
  const [df, ef] = phasesOf(call).map(({ rows }) => rows.map(medianOf));
  assert.ok(ef[1] <= 5 * ef[0], showCall(call).table);
  assert.ok(df[1] >= 5 * df[0], showCall(call).table);
  const busiest = Math.max(...call.load.map(([, mbits]) => mbits));
  assert.ok(busiest > 3 && call.load.some(([, mbits]) => mbits < 1), `${call.load}`);
});

testWith(NEEDS, "shaping: packets wait in a queue, and none is dropped", async () => {
  await using network = await Network.create();
  const [free, shaped] = await measureShaping(network, {}, { kilobytes: 200, seconds: 1.5 });
  assert.deepEqual([free.drops, free.queue.packets, shaped.drops], [0, 0, 0]);
  assert.ok(shaped.queue.packets > 10 && shaped.queue.bytes > 10_000, `${shaped.queue.packets}`);
  // 200 kB at 2 Mbit/s are 0.8 s.
  assert.ok(shaped.reply.milliseconds > 700, `${shaped.reply.milliseconds}`);
  assert.ok(free.reply.milliseconds < shaped.reply.milliseconds);
});

testWith(NEEDS, "policing: packets are dropped and sent again, and none waits", async () => {
  await using network = await Network.create();
  const [shaped, policed] = await measurePolicing(network, {}, { kilobytes: 200, seconds: 1.5 });
  assert.equal(shaped.drops, 0);
  assert.ok(policed.drops > 10 && policed.resent > 10, `${policed.drops}, ${policed.resent}`);
  assert.equal(policed.queue.packets, 0);
  assert.ok(medianOf(policed.row) < medianOf(shaped.row), showPolicing([shaped, policed]).table);
});

testWith(NEEDS, "tos: pfifo_fast treats EF as DF, and ToS 0x10 better", async () => {
  await using network = await Network.create();
  const measured = await measureTos(network, {}, { ticks: 15, every: 80 });
  const [df, ef, low] = measured.rows.map(medianOf);
  assert.ok(ef > df / 5 && low < df / 5, showTos(measured).table);
});

testWith(
  [...NEEDS, "tcpdump"],
  "rewrite: it names each code point that the router clears, and no other; tcpdump agrees",
  async () => {
    await using network = await Network.create();
    await using far = await Capture.start(8086, "s0", network.server.under);
    await using near = await Capture.start(8086, "c0", network.client.under);
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
  await using network = await Chain.create(2);
  const trace = await measurePath(network);
  assert.deepEqual(trace.changed, { after: 1, at: 2, from: 0xb8, to: 0x20 });
  assert.equal(trace.runs.length, 3);
});

// ─── Sentences follow the data ───────────────────────────────────────────────────────────────────

/** A row with 20 requests that took about so many milliseconds, half of them to connect. */
function row(name: string, tos: number, milliseconds: number): Row {
  const row = new Row({ ...markOf(tos), name });
  row.requests = 20;
  for (let at = 0; at < 20; at++) {
    row.total.push(milliseconds * (1 + at / 100));
    row.connect.push(milliseconds * (1 + at / 100) / 2);
  }
  return row;
}

function measured(...rows: Row[]): Measured {
  return { rows, values: rows.map(({ total }) => total) };
}

function priority(idle: number, df: number, ef: number, syn: number): string {
  const rows = [
    row("DF, idle", 0, idle),
    row("DF", 0, df),
    row("EF", 0xb8, ef),
    row("EF --mark-syn", 0xb8, syn),
  ];
  return showPriority(measured(...rows)).sentences.join("\n");
}

Deno.test("priority: the sentences follow the data", () => {
  const gained = priority(1, 400, 200, 2);
  assert.match(gained, /400 times slower: 1\.1 ms on the idle link, 436 ms on the busy one/);
  assert.match(gained, /EF on every packet it takes 2\.2 ms: 200 times faster than DF/);
  assert.match(gained, /EF only after connect it takes 218 ms, of which 109 ms to connect/);
  const same = priority(1, 1, 1, 1);
  assert.match(same, /did not slow an unmarked GET/);
  assert.match(same, /EF on every packet gained nothing/);
  assert.doesNotMatch(same, /faster|slower|after connect/);
  const none = showPriority(measured(...["a", "b", "c", "d"].map((name, at) => {
    const empty = new Row({ ...markOf(at > 1 ? 0xb8 : 0), name });
    return empty;
  }))).sentences;
  assert.equal(none.length, 1);
  assert.match(none[0], /fewer than 8 replies/);
});

function call(before: number, df: number, ef: number): Call {
  const answers = Array.from({ length: 60 }, (_, at) => {
    const second = at / 2, isBusy = second >= 10 && second < 20;
    return [0, 1].map((way) => {
      const total = (isBusy ? [df, ef][way] : before) * (1 + at % 7 / 100);
      const one = new Row(markOf(way === 0 ? 0 : 0xb8));
      one.requests = 1;
      one.total.push(total);
      one.connect.push(total / 2);
      return { way, from: 1e12 + second * 1000, to: 1e12 + second * 1000 + total, row: one };
    });
  }).flat();
  return { answers, began: 1e12, seconds: 30, download: { from: 10, to: 20 }, load: [[1, 5]] };
}

Deno.test("call: the sentences follow the data", () => {
  const gained = showCall(call(1, 500, 1)).sentences.join("\n");
  assert.match(gained, /^DF: 1 ms before the download, 515 ms during it: 500 times slower\.$/m);
  assert.match(gained, /^EF: .*: the download did not slow it\.$/m);
  assert.match(gained, /EF made the call 500 times faster than DF/);
  const same = showCall(call(1, 500, 500)).sentences.join("\n");
  assert.match(same, /^EF: .* 500 times slower\.$/m);
  assert.match(same, /EF gained nothing during the download/);
});

function passage(label: string, milliseconds: number, small: number, drops: number): Passage {
  return {
    label,
    row: row(label, 0, small),
    points: [[0, small], [0.5, null]],
    reply: { kilobytes: 300, milliseconds },
    drops,
    resent: drops,
    queue: { packets: drops > 0 ? 0 : 100, bytes: drops > 0 ? 0 : 150_000 },
    throughput: [[0, 2], [0.1, 2]],
  };
}

Deno.test("shaping and policing: the sentences follow the data", () => {
  const free = passage("no limit", 10, 1, 0), shaped = passage("shaped", 1300, 600, 0);
  const waited = showShaping([free, shaped]).sentences.join("\n");
  assert.match(waited, /reply took 10 ms; shaped, it took 1\.3 s/);
  assert.match(waited, /Up to 100 packets \(150 kB\) waited in the queue; none was dropped/);
  assert.match(waited, /waited behind the reply: 654 ms instead of 1\.1 ms/);
  const full = showShaping([free, { ...free, label: "shaped", drops: 3 }]).sentences.join("\n");
  assert.match(full, /3 were dropped, as the queue was full/);
  assert.match(full, /did not wait behind the reply/);
  const lost = showShaping([free, passage("shaped", NaN, 600, 0)]).sentences.join("\n");
  assert.match(lost, /shaped, it did not come whole/);

  const policed = showPolicing([shaped, passage("policed", 2900, 2, 130)]).sentences.join("\n");
  assert.match(policed, /dropped 130 packets, and the server sent 130 again; the shaper dropped 0/);
  assert.match(
    policed,
    /took 2\.9 s; shaped, it took 1\.3 s: what is dropped has to be sent again/,
  );
  assert.match(policed, /a policer has no queue to wait in/);
  const idle = showPolicing([shaped, { ...shaped, label: "policed" }]).sentences.join("\n");
  assert.match(idle, /dropped nothing this time/);
  assert.match(idle, /took as long policed as shaped/);
  const slow = showPolicing([shaped, passage("policed", 1300, 900, 5)]).sentences.join("\n");
  assert.match(slow, /Small GETs were slower policed/);
});

Deno.test("tos: the sentences follow the data", () => {
  const tos = (df: number, ef: number, low: number) =>
    showTos(measured(row("DF", 0, df), row("EF", 0xb8, ef), row("ToS 0x10", 0x10, low)))
      .sentences.join("\n");
  assert.match(tos(500, 500, 2), /EF gains nothing[^]*ToS 0x10.*250 times faster than DF/);
  assert.match(tos(500, 5, 500), /EF was 100 times faster than DF[^]*gained nothing this time/);
  assert.match(tos(5, 500, 5), /EF was 100 times slower than DF/);
});

Deno.test("rewrite and path: the sentences follow the data", () => {
  const unchanged = Array.from({ length: 64 }, (_, dscp): [number, number] => [dscp, dscp]);
  assert.deepEqual(showRewrite(new Map(unchanged)).sentences, [
    "All 64 code points that arrived were unchanged.",
  ]);
  assert.deepEqual(showRewrite(new Map([[46, 0], [48, 8], [1, 1]])).sentences, [
    "2 of 3 code points arrived changed: EF as DF; CS6 as CS1.",
    "Of 61, the server reported nothing.",
  ]);
  const trace = (tos: number[], changed: Trace["changed"]) =>
    showPath({ runs: [], path: tos.map((tos, at) => ({ hop: at + 1, tos })), changed })
      .sentences[0];
  const changed = { after: 1, at: 2, from: 0xb8, to: 0x20 };
  assert.equal(
    trace([0xb8, 0x20, 0x20], changed),
    "EF (0xB8) was changed to CS1 (0x20) between r1 and r2.",
  );
  assert.match(trace([0xb8, 0xb8, 0xb8], null), /^No change was seen on the 3 of 3 hops/);
  assert.match(trace([], null), /^No hop reported/);
});

// ─── Pictures ────────────────────────────────────────────────────────────────────────────────────

const MADE_UP: Record<string, Shown> = {
  priority: showPriority(
    measured(
      ...["DF, idle", "DF", "EF", "EF --mark-syn"].map((name, at) => row(name, 0, 10 ** at)),
    ),
  ),
  call: showCall(call(1, 500, 2)),
  shaping: showShaping([passage("no limit", 10, 1, 0), passage("shaped", 1300, 600, 0)]),
  policing: showPolicing([passage("shaped", 1300, 600, 0), passage("policed", NaN, 2, 130)]),
  tos: showTos(measured(row("DF", 0, 500), row("EF", 0xb8, 500), row("ToS 0x10", 0x10, 2))),
  rewrite: showRewrite(new Map([[46, 0], [48, 8]])),
  path: showPath({ runs: [{ title: "<b>", text: "a & b" }], path: [], changed: null }),
};

/** Checks that each element is closed, in order. */
function assertWellFormed(xml: string): void {
  const open: string[] = [];
  for (const [, slash, name, rest] of xml.matchAll(/<(\/?)([a-z][\w]*)([^<>]*)>/g)) {
    if (slash === "/") assert.equal(open.pop(), name);
    else if (!rest.endsWith("/")) open.push(name);
  }
  assert.deepEqual(open, []);
  assert.doesNotMatch(xml, /NaN|Infinity|undefined|null/);
}

Deno.test("each scene's picture is self-contained, described, and readable in light and dark", () => {
  for (const { name } of SCENES) {
    const { picture } = MADE_UP[name], svg = drawSvg(picture);
    assertWellFormed(svg);
    assert.match(svg, /<svg [^>]*>\n +<title>[^<]+<\/title>\n +<desc>[^<]+<\/desc>/);
    assert.match(svg, /prefers-color-scheme: dark/);
    assert.doesNotMatch(svg, /<script|<image|href|@import|url\(/);
    // At a width of 800 pixels.
    const width = Number(/viewBox="0 0 (\d+)/.exec(svg)![1]);
    const sizes = [...svg.matchAll(/(?:font|font-size): (\d+)px/g)].map(([, size]) => Number(size));
    assert.ok(sizes.length > 0 && sizes.every((size) => size * 800 / width >= 12), `${sizes}`);
    for (const { name } of picture.topology.hosts) assert.ok(svg.includes(`>${name}</text>`));
  }
});

Deno.test("a picture has one dot for each request and a cross for each without a reply", () => {
  const count = (svg: string, style: string) => svg.split(`${style}"/>`).length - 1;
  // Legends have a dot too.
  assert.equal(count(drawSvg(MADE_UP.priority.picture), " dot"), 4 * 20);
  assert.equal(count(drawSvg(MADE_UP.call.picture), " dot"), 2 * 60 + 2);
  const shaping = drawSvg(MADE_UP.shaping.picture);
  assert.deepEqual([count(shaping, " dot"), count(shaping, " failed")], [2 + 2, 2]);
});

Deno.test("the page has all scenes, and needs neither scripts nor a network", () => {
  const html = page(SCENES.map((scene) => ({ scene, shown: MADE_UP[scene.name] })));
  for (const { name } of SCENES) assert.ok(html.includes(`<section id="${name}">`));
  assert.equal(html.split("<svg ").length - 1, SCENES.length);
  assert.doesNotMatch(html, /<script|<link|src=|@import|url\(|<b>/);
  const links = [...html.matchAll(/(?:href|xmlns)="([^"]*)"/g)].map(([, link]) => link);
  assert.ok(links.every((link) => /^#\w+$|^http:\/\/www\.w3\.org\/2000\/svg$/.test(link)));
});

Deno.test("a log axis has ticks from end to end; durations are short", () => {
  const { ticks, place } = logScale([0.7, 1700], 100, 500);
  assert.deepEqual(ticks, [1, 10, 100, 1000]);
  assert.deepEqual([0.5, 2000].map(place), [100, 500]);
  assert.deepEqual(logScale([3, 4], 0, 1).ticks, [2, 5]);
  assert.deepEqual(logScale([], 0, 1).ticks, [1, 2, 5, 10]);
  const values = [0.123, 1, 1.25, 12.5, 999.4, 999.6, 1500, NaN].map(duration);
  assert.deepEqual(values, "0.12 ms,1 ms,1.3 ms,13 ms,999 ms,1 s,1.5 s,no reply".split(","));
});

Deno.test("what is printed is at most 80 columns wide", () => {
  for (const { name, topology, commands } of SCENES) {
    const text = [drawTopology(topology), ...commands.map(([, line]) => line), MADE_UP[name].table];
    for (const line of text.join("\n").split("\n")) assert.ok(line.length <= 80, line);
  }
});

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
    assert.match(user.stderr, /^lab: needs root; run it with sudo [^\n]+\n$/);
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
  for (const args of [["--moon"], ["--scene"], ["x"], ["--scene", "all", "--svg", "x"]]) {
    assert.equal((await lab(...args)).code, 2);
  }
});
