import assert from "node:assert/strict";
import { markOf } from "../../ffi/mod.ts";
import { Row } from "../../src/series.ts";
import { type Run, showArrival, showDrop } from "./arrival.ts";
import { byHand } from "./hand.ts";
import { SCENES } from "./lab.ts";
import { type Passage, showPolicing, showShaping } from "./limits.ts";
import { showPath, showRewrite, type Trace } from "./marks.ts";
import { page } from "./page.ts";
import { drawSvg, drawTopology, duration, logScale } from "./plot.ts";
import { type Call, showCall, showPriority, showTos } from "./queuing.ts";
import { endedBy, type Measured, type Shown } from "./scene.ts";
import { inNamespace } from "./site.ts";
import { within } from "../support/waiting.ts";

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

/** A run whose far end reports these bytes and this address, or nothing. */
function run(title: string, code: number, arrived: Run["json"]["arrived"], repeats = 0): Run {
  const milliseconds = {
    connect: code === 0 || repeats > 0 ? 1 : null,
    firstByte: code === 28 ? null : 2,
  };
  return {
    title,
    text: `report of ${title}`,
    code,
    json: { arrived, milliseconds, sent: { repeats } },
  };
}

Deno.test("arrival and drop: the sentences follow the data", () => {
  const runs = [
    run("Plain", 0, { syn: 0, data: 0xb8, nat: null }),
    run("Marked anew", 102, { syn: 0, data: 0x20, nat: null }),
    run("NAT", 0, { syn: 0, data: 0xba, nat: "192.0.2.1:40000" }),
    run("Both", 102, { syn: 0, data: 0, nat: "192.0.2.1:40000" }),
    run("Handshake only", 0, { syn: 0, data: null, nat: null }),
    run("Proxy", 0, null),
  ];
  const { sentences, table } = showArrival({ runs, log: "a line of the log" });
  assert.deepEqual(sentences, [
    "Plain, the request arrived with EF (0xB8), as it was sent (exit 0).",
    "Marked anew, the request arrived with CS1 (0x20), not with EF (0xB8) (exit 102).",
    "NAT, the request arrived with EF (0xB8), as it was sent; the far end sees the address " +
    "192.0.2.1 (exit 0).",
    "Both, the request arrived with DF (0x00), not with EF (0xB8); the far end sees the address " +
    "192.0.2.1 (exit 102).",
    "Handshake only, the far end does not report the request's mark (exit 0).",
    "Proxy, nothing is known of what arrived (exit 0).",
  ]);
  assert.match(table, /^Both \(exit 102\):\nreport of Both$/m);
  assert.match(table, /The far end's log:\na line of the log\n$/);
  const three = [
    run("-d DF", 0, null),
    run("-d EF", 28, null, 4),
    run("-d EF --mark-syn", 28, null),
  ];
  const passed = "-d DF: the reply came (exit 0).";
  assert.deepEqual(showDrop({ runs: three, dropped: 18 }).sentences, [
    passed,
    "-d EF: it connected, sent the request 5 times, and got no reply (exit 28).",
    "-d EF --mark-syn: it did not connect (exit 28).",
    "The router dropped 18 packets.",
  ]);
  assert.deepEqual(showDrop({ runs: three.slice(0, 1), dropped: 0 }).sentences, [
    passed,
    "The router dropped nothing this time.",
  ]);
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
  arrival: showArrival({ runs: [run("NAT", 0, null)], log: `peer ${"x".repeat(70)}` }),
  drop: showDrop({
    runs: [{ ...run("-d EF", 28, null, 4), text: "word ".repeat(40) }],
    dropped: 5,
  }),
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
    const { hosts, links } = picture.topology;
    for (const { name } of hosts) assert.ok(svg.includes(`>${name}</text>`));
    for (const device of links.flatMap(({ left, right }) => [left, right])) {
      assert.ok(svg.includes(`>${device}</text>`), device);
    }
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

Deno.test("lab.svg says which packets are marked, names its axis, and spells DF and EF out once", () => {
  const texts = [...drawSvg(MADE_UP.priority.picture).matchAll(/<text [^>]*>([^<]*)</g)]
    .map(([, text]) => text);
  for (
    const label of [
      "DF, link idle",
      "DF",
      "EF, but not the SYN",
      "EF, SYN too",
      "time for one GET, log scale",
    ]
  ) assert.equal(texts.filter((text) => text === label).length, 1, label);
  for (const words of ["Default Forwarding", "Expedited Forwarding"]) {
    assert.equal(texts.filter((text) => text.includes(words)).length, 1, words);
  }
});

Deno.test("a rate is drawn as a step over the time of which it is the mean, and both axes named", () => {
  const svg = drawSvg(MADE_UP.shaping.picture);
  const line = /<polyline points="([^"]*)" class="s0 line"/g;
  const [, points] = [...svg.matchAll(line)].at(-1)!;
  const steps = points.split(" ").map((point) => point.split(",").map(Number));
  assert.equal(steps.length, 4);
  // From the end of one to the end of the next, at the height of the next.
  assert.deepEqual([steps[2][0], steps[2][1]], [steps[1][0], steps[3][1]]);
  assert.ok(steps[3][0] > steps[2][0]);
  for (const axis of ["Mbit/s", "time, log scale", "seconds since the large reply was asked for"]) {
    assert.ok(svg.includes(`>${axis}</text>`), axis);
  }
});

Deno.test("the page has all scenes, and needs neither scripts nor a network", () => {
  const html = page(SCENES.map((scene) => ({ scene, shown: MADE_UP[scene.name] })));
  for (const { name } of SCENES) assert.ok(html.includes(`<section id="${name}">`));
  assert.equal(html.split("<svg ").length - 1, SCENES.length);
  // Each network is drawn once: in the picture, and not in text as well.
  assert.doesNotMatch(html, /[├┤]/);
  for (const word of ["DSCP", "DF", "EF", "queue", "median", "NAT"]) {
    assert.match(html, new RegExp(`<dt>${word}</dt><dd>[^<]+</dd>`));
  }
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

// ─── By hand ─────────────────────────────────────────────────────────────────────────────────────

Deno.test("the drawing names the devices that the commands name, and no others", () => {
  for (const scene of SCENES) {
    const { wiring, topology, commands, looks, tries } = scene, drawn = drawTopology(topology);
    const devices = wiring.links.flatMap(({ left, right }) => [left, right]);
    for (const device of devices) assert.match(drawn, new RegExp(`─${device}─`), scene.name);
    assert.deepEqual(topology.hosts.map(({ name }) => name), wiring.hosts);
    for (const [host, line] of [...commands, ...looks, ...tries]) {
      assert.ok(wiring.hosts.includes(host), `${host}: ${line}`);
      for (const [, device] of line.matchAll(/\b(?:dev|[io]ifname|-ni) (\w+)/g)) {
        assert.ok(devices.includes(device), line);
      }
    }
  }
});

Deno.test("a command is written so that it runs in its namespace, and fits 80 columns", () => {
  const long = `nft ${"x".repeat(60)}`;
  for (
    const [line, written] of [
      ["ip link set lo up", "ip -n lab-client link set lo up"],
      ["ip -6 route show", "ip -n lab-client -6 route show"],
      ["tc -s qdisc", "tc -n lab-client -s qdisc"],
      ["ipset list", "ip netns exec lab-client ipset list"],
      [long.slice(0, 55), `ip netns exec lab-client ${long.slice(0, 55)}`],
      [long.slice(0, 56), `ip netns exec lab-client \\\n  ${long.slice(0, 56)}`],
      ["nft a \\\n  b", "ip netns exec lab-client nft a \\\n  b"],
    ]
  ) assert.equal(inNamespace("lab-client", line), written);
  for (const scene of SCENES) {
    for (const line of byHand(scene, [], "lab").split("\n")) {
      // The paths of the checkout and of Deno are as long as they are.
      assert.ok(line.length <= 80 || /^\w+='/.test(line), line);
    }
  }
});

Deno.test("a text by hand names another prefix wherever it has to", () => {
  const text = byHand(SCENES[0], ["ip netns add mine-client"], "mine");
  assert.match(text, /--scene priority --again --name mine$/m);
  assert.match(text, /--remove --name mine$/m);
  assert.doesNotMatch(text, /lab-/);
  assert.doesNotMatch(byHand(SCENES[0], [], "lab"), /--name/);
});

Deno.test("an interrupted scene ends, whatever it waits for", async () => {
  const abort = new AbortController();
  let kills = 0;
  const hosts = [{ kill: () => Promise.resolve(void kills++) }];
  const never = endedBy(abort.signal, new Promise(() => {}), hosts, 0.05);
  abort.abort(new Error("interrupted"));
  await assert.rejects(within(never, "the end of the scene", 5), /^Error: interrupted$/);
  assert.ok(kills > 0);
  assert.equal(await endedBy(new AbortController().signal, Promise.resolve(7), hosts), 7);
});
