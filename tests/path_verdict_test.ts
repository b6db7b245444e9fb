import assert from "node:assert/strict";
import type { Hop } from "../ffi/mod.ts";
import { icmpMeaning, keptLowerBits } from "../ffi/icmp.ts";
import { markOf } from "../ffi/mod.ts";
import type { Arrival, Sent } from "../src/exchange.ts";
import { Exit, Failure } from "../src/failure.ts";
import {
  changesOf,
  hopRow,
  markThere,
  pathFailure,
  pathOutcome,
  pathReport,
  placeOf,
  reportedPacket,
  type TracedPath,
} from "../src/path_text.ts";
import { NOT_OBSERVED } from "../src/verdict.ts";

const EF = 0xb8, CS1 = 0x20, AF41 = 0x88;
const BLANK = {
  address: null,
  milliseconds: null,
  tos: null,
  icmpTos: null,
  evidence: null,
  answer: null,
};

const silent = (hop: number): Hop => ({ ...BLANK, hop });
/** A router that answers; `null` if it does not show the mark. */
const router = (hop: number | null, tos: number | null, answer = "time exceeded"): Hop => ({
  ...BLANK,
  hop,
  address: `10.0.0.${hop ?? 9}`,
  milliseconds: 1,
  tos,
  evidence: tos === null ? null : "quote",
  answer,
});
const target = (hop: number | null, tos: number | null = null): Hop => ({
  ...router(hop, tos, "connected"),
  evidence: tos === null ? null : "server",
});

/** What the server reports of a connection whose SYN was marked. */
function arrival(syn: number | null, data: number | null = null, isOther = false): Arrival {
  const changes = data !== null && data !== EF
    ? [{ packet: "data" as const, sent: EF, wanted: EF, arrived: data }]
    : [];
  const unknown = { nat: null, ecn: null, kept: null, handshake: null };
  return { ...unknown, syn, ack: null, data, isOther, marked: [], changes };
}

const onePacket: Sent = {
  ...NOT_OBSERVED,
  packets: [{}] as unknown as Sent["packets"],
};
const sentAs = (wrong: number): Sent => ({ ...NOT_OBSERVED, wrong });

function traced(
  path: readonly Hop[],
  exchange: Partial<NonNullable<TracedPath["exchange"]>> = {},
  tos = EF,
): TracedPath {
  return {
    mark: markOf(tos),
    path,
    exchange: { sent: NOT_OBSERVED, arrived: null, failure: null, ...exchange },
  };
}

Deno.test("a change is between the last hop that received the mark and the first that did not", () => {
  const tests: [name: string, path: Hop[], changes: [number, number | null, number, number][]][] = [
    ["no hop", [], []],
    ["kept", [router(1, EF), router(2, EF)], []],
    ["ECN bits are no change", [router(1, EF | 1), router(2, EF | 3)], []],
    ["on this host or the first link", [router(1, CS1)], [[0, 1, EF, CS1]]],
    ["behind hop 1", [router(1, EF), router(2, CS1), router(3, CS1)], [[1, 2, EF, CS1]]],
    ["a silent hop in between", [router(1, EF), silent(2), router(3, CS1)], [[1, 3, EF, CS1]]],
    ["seen by the server alone", [router(1, EF), target(2, 0)], [[1, 2, EF, 0]]],
    ["a target at an unknown distance", [router(1, EF), target(null, 0)], [[1, null, EF, 0]]],
    ["twice", [router(1, EF), router(2, AF41), router(3, 0)], [
      [1, 2, EF, AF41],
      [2, 3, AF41, 0],
    ]],
  ];
  for (const [name, path, changes] of tests) {
    const found = changesOf({ mark: markOf(EF), path });
    assert.deepEqual(found.map(({ after, at, from, to }) => [after, at, from, to]), changes, name);
  }
});

Deno.test("the place of a change names the hops in between that do not show the mark", () => {
  const tests: [path: Hop[], after: number, at: number | null, place: string][] = [
    [[router(1, EF), router(2, CS1)], 1, 2, "between hop 1 (10.0.0.1) and hop 2 (10.0.0.2)"],
    [[router(1, CS1)], 0, 1, "between this host and hop 1 (10.0.0.1)"],
    [
      [silent(1), router(2, CS1)],
      0,
      2,
      "between this host and hop 2 (10.0.0.2) (silent in between: 1)",
    ],
    [
      [router(1, EF), silent(2), silent(3), router(4, CS1), silent(5)],
      1,
      4,
      "between hop 1 (10.0.0.1) and hop 4 (10.0.0.4) (silent in between: 2, 3)",
    ],
    [
      [router(1, EF), router(2, null), silent(3), router(4, CS1)],
      1,
      4,
      "between hop 1 (10.0.0.1) and hop 4 (10.0.0.4) (unknown in between: 2, 3)",
    ],
    [
      [router(1, EF), silent(2), target(null, 0)],
      1,
      null,
      "between hop 1 (10.0.0.1) and the target (10.0.0.9) (silent in between: 2)",
    ],
    [
      [router(1, EF), router(null, CS1)],
      1,
      null,
      "between hop 1 (10.0.0.1) and 10.0.0.9, at an unknown distance",
    ],
  ];
  for (const [path, after, at, place] of tests) assert.equal(placeOf({ after, at }, path), place);
});

Deno.test("what became of a mark, in a word and in a sentence", () => {
  const way = [router(1, EF), router(2, EF)];
  const tests: [name: string, traced: TracedPath, sort: string, text: string | RegExp][] = [
    [
      "changed",
      traced([router(1, EF), router(2, CS1)]),
      "changed",
      "changed to CS1 (0x20) between hop 1 (10.0.0.1) and hop 2 (10.0.0.2)",
    ],
    [
      "changed twice",
      traced([router(1, EF), router(2, AF41), router(3, 0)]),
      "changed",
      /^changed to AF41 \(0x88\) between .*, then to DF \(0x00\) between hop 2 .* and hop 3/,
    ],
    [
      "changed before the first hop",
      traced([router(1, CS1)]),
      "changed",
      "changed to CS1 (0x20) between this host and hop 1 (10.0.0.1)",
    ],
    [
      "changed on this host",
      traced([router(1, CS1)], { sent: sentAs(CS1) }),
      "changed",
      "changed to CS1 (0x20) on this host",
    ],
    [
      "left wrong, and changed on the path",
      traced([router(1, EF), router(2, CS1)], { sent: sentAs(CS1) }),
      "changed",
      /between hop 1 /,
    ],
    [
      "the request left wrong, the SYN right",
      traced(way, { sent: sentAs(CS1) }),
      "changed",
      /^kept as far as hop 2 \(10\.0\.0\.2\) on the SYN, but the request left this host as CS1 /,
    ],
    [
      "whole",
      traced([...way, target(3, EF)], { sent: onePacket, arrived: arrival(EF, EF) }),
      "kept all the way",
      "kept all the way: the server reports it",
    ],
    [
      "only the SYN is reported",
      traced([...way, target(3, EF)], { sent: onePacket, arrived: arrival(EF) }),
      "kept all the way",
      "kept all the way on the packets that the server reports",
    ],
    [
      "data changed behind the SYN",
      traced([...way, target(3, EF)], { sent: onePacket, arrived: arrival(EF, CS1) }),
      "changed",
      "kept all the way on the SYN, but data arrived as CS1 (0x20)",
    ],
    [
      "data changed, and the SYN on the path is not whole",
      traced([...way, target(3)], { arrived: arrival(EF, CS1, true) }),
      "kept as far as shown",
      "kept as far as hop 2 (10.0.0.2), the last that showed it",
    ],
    [
      "lower bits",
      traced([{ ...router(1, null), evidence: "icmp" }, router(2, null)]),
      "not shown",
      "kept in its lower bits as far as hop 1 (10.0.0.1); no more is known",
    ],
    [
      "not shown by routers",
      traced([router(1, null), target(2)]),
      "not shown",
      "not shown by the routers that answered",
    ],
    ["the target first", traced([target(1)]), "not shown", /the first hop is the target/],
    [
      "the target, but not first",
      traced([silent(1), target(2)]),
      "not shown",
      /no router answered/,
    ],
    ["a router first", traced([router(1, null, "host unreachable")]), "not shown", /^not seen/],
    ["no hop", traced([]), "not shown", /^not seen: no router answered/],
    ["no request yet", { ...traced(way), exchange: null }, "kept as far as shown", /hop 2 /],
  ];
  for (const [name, of, sort, text] of tests) {
    const outcome = pathOutcome(of);
    assert.equal(outcome.sort, sort, name);
    if (typeof text === "string") assert.equal(outcome.text, text, name);
    else assert.match(outcome.text, text, name);
  }
});

Deno.test("a changed mark is 102, unless the failure is this host's own", () => {
  const changed = [router(1, EF), router(2, CS1)];
  const failed = (code: number, cause?: Failure) => {
    const failure = new Failure(code, "so it was", "do this");
    failure.cause = cause;
    return failure;
  };
  const tests: [path: Hop[], failure: Failure | null, code: number | null, message: RegExp][] = [
    [[router(1, EF)], null, null, /^$/],
    [[router(1, EF)], failed(7), 7, /^so it was$/],
    [
      changed,
      null,
      102,
      /^the path changed EF \(0xB8\) to CS1 \(0x20\) between hop 1 and hop 2$/,
    ],
    [[router(1, CS1)], null, 102, /^this host or the path changed .* this host and hop 1$/],
    [changed, failed(22), 102, /hop 2; so it was$/],
    [changed, failed(102), 102, /hop 2$/],
    [changed, failed(102, failed(28)), 102, /hop 2; so it was$/],
    [changed, failed(Exit.notMarked), 100, /^so it was$/],
    [changed, failed(Exit.sentChanged), 101, /^so it was$/],
    [changed, failed(Exit.cannotRun), 103, /^so it was$/],
    [changed, failed(Exit.notProved), 102, /hop 2; so it was$/],
  ];
  for (const [path, failure, code, message] of tests) {
    const found = pathFailure(traced(path, { failure }));
    assert.equal(found?.code ?? null, code);
    assert.match(found?.message ?? "", message);
    assert.equal(found?.hint, failure?.hint);
  }
  assert.equal(pathFailure({ ...traced(changed), exchange: null })!.code, 102);
});

Deno.test("of what the server reports, the SYN counts first, then data, then the ACK", () => {
  const none = arrival(null);
  assert.equal(reportedPacket(null), null);
  assert.equal(reportedPacket({ ...none, syn: EF, isOther: true }), null);
  assert.deepEqual(reportedPacket({ ...none, syn: 0, ack: 1, data: 2 }), { packet: "SYN", tos: 0 });
  assert.deepEqual(reportedPacket({ ...none, ack: 1, data: 2 }), { packet: "data", tos: 2 });
  assert.deepEqual(reportedPacket({ ...none, ack: 1 }), { packet: "ACK", tos: 1 });
});

Deno.test("a row says what is known of the mark, and fits", () => {
  const way = [router(1, EF), router(2, CS1), router(3, CS1), silent(4)];
  const after = (count: number, width = 80) => hopRow(traced(way.slice(0, count)), width);
  assert.equal(
    after(1),
    "hop  address             ms  mark there\n  1  10.0.0.1           1.0  EF (0xB8)\n",
  );
  assert.equal(after(2), "  2  10.0.0.2           1.0  CS1 (0x20)   changed\n");
  assert.equal(after(3), "  3  10.0.0.3           1.0  CS1 (0x20)\n");
  assert.equal(after(4), "  4  (no answer)\n");
  const narrow = after(2, 40).split("\n");
  assert.deepEqual(narrow, [
    "  2  10.0.0.2           1.0",
    `${" ".repeat(20)}CS1 (0x20)   changed`,
    "",
  ]);
  // Exactly as wide as it may be: one row.
  const row = after(2).trimEnd();
  assert.equal(after(2, row.length), `${row}\n`);
  assert.equal(after(2, row.length - 1).split("\n").length, 3);
  assert.ok(after(1, 10).startsWith("hop  addre\n"));
  // A change that was shown before an unknown hop is not that hop's.
  const unknown = [router(1, EF), router(null, CS1), { ...target(null), tos: null }];
  assert.doesNotMatch(hopRow(traced(unknown), 80), /changed/);
  assert.match(hopRow(traced([target(null)]), 80), /\n {2}\? {2}10\.0\.0\.9 /);
  const long = { ...router(1, EF), address: "2001:db8:1234:5678::1" };
  assert.match(hopRow(traced([long]), 80), /^hop {2}address {15} {4}ms/);
});

Deno.test("what is known of the mark at a hop", () => {
  const tests: [hop: Hop, arrived: Arrival | null, text: string][] = [
    [router(1, EF), null, "EF (0xB8)"],
    [router(1, EF | 1), null, "EF (0xB8)"],
    [router(1, CS1), null, "CS1 (0x20)"],
    [router(1, null), null, "unknown"],
    [{ ...router(1, null), evidence: "icmp" }, null, "lower bits kept"],
    [router(1, EF, "host unreachable"), null, "EF (0xB8); host unreachable"],
    [router(1, null, "host unreachable"), null, "unknown; host unreachable"],
    [target(1), null, "connected"],
    [router(1, null, "connection refused"), null, "connection refused"],
    [target(1, CS1), arrival(CS1), "connected; server reports SYN CS1 (0x20)"],
  ];
  for (const [hop, arrived, text] of tests) {
    assert.equal(markThere(hop, markOf(EF), arrived), text);
  }
});

Deno.test("several marks: a table if it fits, changes by their place, and a count", () => {
  const all = [
    traced([router(1, EF), router(2, CS1), target(3, CS1)]),
    traced([router(1, AF41), router(2, AF41), target(3, AF41)], {}, AF41),
    traced([router(1, 0xc0), router(2, CS1), target(3, CS1)], {}, 0xc0),
  ];
  const text = pathReport(all, true, 80);
  assert.equal(
    text,
    `hop  address   EF    AF41  CS6
  1  10.0.0.1  EF    AF41  CS6
  2  10.0.0.2  CS1!  AF41  CS1!
  3  10.0.0.3  CS1!  AF41  CS1!
Between hop 1 (10.0.0.1) and hop 2 (10.0.0.2): EF, CS6 → CS1
Of 3 marks: 2 changed, 1 kept all the way.
`,
  );
  const widest = Math.max(...text.split("\n").slice(0, 4).map(({ length }) => length));
  assert.match(pathReport(all, true, widest), /^hop /);
  assert.doesNotMatch(pathReport(all, true, widest - 1), /^hop /);
  const times = (count: number) => pathReport(Array(count).fill(all[1]), true, 80);
  assert.match(times(8), /^hop /);
  assert.doesNotMatch(times(9), /^hop /);
  assert.equal(pathReport([], true, 80), "");
  assert.match(pathReport([all[0]], true, 80), /Of 1 mark: 1 changed\.\n$/);
  const other = { ...router(1, EF), address: "10.0.0.7" };
  assert.match(
    pathReport([traced([router(1, EF)]), traced([other])], true, 80),
    /\n {2}1 {2}10\.0\.0\.1 \+1 +EF +EF\n/,
  );
  const hidden = { ...router(1, null), evidence: "icmp" as const };
  assert.match(
    pathReport([traced([hidden]), traced([router(1, null)]), traced([silent(1)])], true, 80),
    /\n {2}1 {2}10\.0\.0\.1 {2}lower {2}\? {3}-\n/,
  );
});

Deno.test("one mark: its outcome as a sentence, wrapped, and nothing without a hop", () => {
  assert.equal(pathReport([traced([])], false, 80), "");
  assert.equal(
    pathReport([traced([router(1, EF)])], false, 80),
    "EF (0xB8) was kept as far as hop 1 (10.0.0.1), the last that showed it.\n",
  );
  for (const line of pathReport([traced([router(1, EF)])], false, 40).split("\n")) {
    assert.ok(line.length <= 40);
  }
});

Deno.test("each ICMP error has its words", () => {
  const words: Record<string, string> = {
    "4/11/0": "time exceeded",
    "4/11/1": "ICMP type 11 code 1",
    "4/3/0": "network unreachable",
    "4/3/1": "host unreachable",
    "4/3/2": "protocol unreachable",
    "4/3/3": "port unreachable",
    "4/3/4": "ICMP type 3 code 4",
    "4/3/6": "network unknown",
    "4/3/7": "host unknown",
    "4/3/9": "network administratively prohibited",
    "4/3/10": "host administratively prohibited",
    "4/3/11": "network unreachable for this ToS",
    "4/3/12": "host unreachable for this ToS",
    "4/3/13": "administratively prohibited",
    "4/12/0": "ICMP type 12 code 0",
    "6/3/0": "time exceeded",
    "6/3/1": "ICMPv6 type 3 code 1",
    "6/1/0": "no route",
    "6/1/1": "administratively prohibited",
    "6/1/2": "beyond scope of source address",
    "6/1/3": "address unreachable",
    "6/1/4": "port unreachable",
    "6/1/5": "source address failed policy",
    "6/1/6": "reject route",
    "6/1/7": "ICMPv6 type 1 code 7",
    "6/4/0": "ICMPv6 type 4 code 0",
  };
  for (const [numbers, meaning] of Object.entries(words)) {
    const [version, type, code] = numbers.split("/").map(Number);
    assert.equal(icmpMeaning({ version: version as 4 | 6, type, code }), meaning, numbers);
  }
});

Deno.test("the ICMP message's own byte shows that lower bits were kept, and nothing else", () => {
  for (let tos = 0; tos < 256; tos += 4) {
    for (let arrived = 0; arrived < 256; arrived += 4) {
      const isKept = keptLowerBits(tos, arrived & 0x1e | 0xc0);
      assert.equal(isKept, (tos & 0x1c) !== 0 && (tos & 0x1c) === (arrived & 0x1c));
    }
  }
});
