import assert from "node:assert/strict";
import type { Hop } from "../ffi/mod.ts";
import { keptLowerBits } from "../ffi/icmp.ts";
import { markOf } from "../ffi/mod.ts";
import type { Arrival, Sent } from "../src/exchange.ts";
import { Exit, Failure } from "../src/failure.ts";
import {
  changesOf,
  hopList,
  hopRow,
  markThere,
  openHops,
  pathFailure,
  pathOutcome,
  pathReport,
  placeOf,
  reportedPacket,
  shortSeconds,
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
  waited: null,
};

const silent = (hop: number, waited = 5000): Hop => ({ ...BLANK, hop, waited });
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

const returned = { sent: null, arrived: null, kept: null };
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
    exchange: { sent: NOT_OBSERVED, arrived: null, returned, failure: null, ...exchange },
    isFreshPort: false,
  };
}

/** The row of the hop that came last. */
const rowOf = (of: TracedPath, width = 80) =>
  hopRow(of, of.path.at(-1)!, width, of.path.length === 1);

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
      "changed to CS1 (0x20) between hop 1 (10.0.0.1) and hop 2 (10.0.0.2), " +
      "as by Re-mark-DSCP (RFC 9435, 4.3)",
    ],
    [
      "changed twice",
      traced([router(1, EF), router(2, AF41), router(3, 0)]),
      "changed",
      /^changed to AF41 \(0x88\) between .*, then to DF \(0x00\) between hop 2 .* and hop 3 .*Bleach-DSCP/,
    ],
    [
      "changed and back",
      traced([router(1, EF), silent(2), router(3, CS1), router(4, CS1), target(5, EF)]),
      "changed",
      "received as EF (0xB8) by hops 1, 5, as CS1 (0x20) by hops 3, 4: " +
      "the hops disagree, as if packets took several ways",
    ],
    [
      "changed back to a mark that came on the way",
      traced([router(1, AF41), router(2, CS1), router(3, AF41)]),
      "changed",
      /^received as AF41 \(0x88\) by hops 1, 3, as CS1 \(0x20\) by hop 2: the hops disagree/,
    ],
    [
      "nothing answers behind hop 2",
      traced([...way, silent(3), silent(4)], { failure: new Failure(Exit.timeout, "") }),
      "no answer",
      "kept as far as hop 2 (10.0.0.2), and nothing behind it answered",
    ],
    [
      "interrupted behind hop 2",
      traced([...way, silent(3)], { failure: new Failure(130, "") }),
      "kept as far as shown",
      /last that showed it$/,
    ],
    [
      "the target is there, the reply is late",
      traced([...way, target(3)], { failure: new Failure(Exit.timeout, "") }),
      "kept as far as shown",
      /last that showed it$/,
    ],
    [
      "rejected behind hop 2",
      traced([...way, router(3, EF, "host unreachable")], { failure: new Failure(7, "") }),
      "rejected",
      "kept as far as hop 3 (10.0.0.3), and rejected: host unreachable",
    ],
    [
      "refused by the target",
      traced([...way, router(3, null, "connection refused")], { failure: new Failure(7, "") }),
      "kept as far as shown",
      /^kept as far as hop 2 /,
    ],
    [
      "probes rejected, the target not",
      traced([...way, router(3, EF, "host unreachable"), target(null)]),
      "kept as far as shown",
      /^kept as far as hop 3 /,
    ],
    [
      "changed by a rule that has a name",
      traced([router(1, EF), router(2, 0xa0)]),
      "changed",
      /, as by Bleach-low or Bleach-some-low or Re-mark-DSCP \(RFC 9435, 4, 4\.3\)$/,
    ],
    [
      "changed before the first hop",
      traced([router(1, CS1)]),
      "changed",
      /^changed to CS1 \(0x20\) between this host and hop 1 \(10\.0\.0\.1\), as by /,
    ],
    [
      "changed on this host",
      traced([router(1, CS1)], { sent: sentAs(CS1) }),
      "changed",
      /^changed to CS1 \(0x20\) on this host, as by /,
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
      "changed on the way back",
      traced([...way, target(3, EF)], { returned: { sent: EF, arrived: 0, kept: false } }),
      "changed on the way back",
      "kept all the way, but the reply came back as DF (0x00)",
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
      traced([
        { ...router(1, null), evidence: "icmp" },
        { ...router(2, null), evidence: "icmp" },
        router(3, null),
      ]),
      "not shown",
      "kept in its lower bits as far as hop 2 (10.0.0.2); no more is known",
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
    ["a router first", traced([router(1, null, "host unreachable")]), "rejected", /^not seen/],
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
    [
      [router(1, EF), router(2, CS1), router(3, EF)],
      failed(22),
      102,
      /^the hops disagree on EF \(0xB8\), as if packets took several ways; hop 2 received CS1 \(0x20\); so it was$/,
    ],
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
  const after = (count: number, width = 80) => rowOf(traced(way.slice(0, count)), width);
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
  assert.doesNotMatch(rowOf(traced(unknown)), /changed/);
  assert.match(rowOf(traced([target(null)])), /\n {2}\? {2}10\.0\.0\.9 /);
  const long = { ...router(1, EF), address: "2001:db8:1234:5678::1" };
  assert.match(rowOf(traced([long])), /^hop {2}address {15} {4}ms/);
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
Between hop 1 (10.0.0.1) and hop 2 (10.0.0.2): EF, CS6 → CS1, by no single rule
of RFC 9435.
Of 3 marks: 2 changed (EF, CS6), 1 kept all the way (AF41).
`,
  );
  const widest = Math.max(...text.split("\n").slice(0, 4).map(({ length }) => length));
  assert.match(pathReport(all, true, widest), /^hop /);
  assert.doesNotMatch(pathReport(all, true, widest - 1), /^hop /);
  const bleached = traced(all[1].path, { returned: { sent: 0x88, arrived: 0, kept: false } }, AF41);
  assert.match(
    pathReport([all[0], bleached], true, 80),
    /: 1 changed \(EF\), 1 changed on the way back \(AF41\)\.\n$/,
  );
  // What the places of changes do not say is said in words, once for all marks that share it.
  const rejected = [EF, AF41].map((tos) =>
    traced([router(1, tos, "host unreachable")], { failure: new Failure(7, "") }, tos)
  );
  assert.equal(
    pathReport([...rejected, bleached], true, 200).split("\n").slice(4).join("\n"),
    `EF, AF41 were kept as far as hop 1 (10.0.0.1), and rejected: host unreachable.
AF41 was kept all the way, but the reply came back as DF (0x00).
Of 3 marks: 2 rejected (EF, AF41), 1 changed on the way back (AF41).
`,
  );
  const times = (count: number) => pathReport(Array(count).fill(all[1]), true, 80);
  assert.match(times(8), /^hop /);
  assert.doesNotMatch(times(9), /^hop /);
  assert.equal(pathReport([], true, 80), "");
  assert.match(pathReport([all[0]], true, 80), /Of 1 mark: 1 changed\.\n$/);
  const counted = (count: number) => pathReport([...Array(count).fill(all[1]), all[0]], true, 1000);
  assert.match(counted(8), /: 8 kept all the way \((AF41, ){7}AF41\), 1 changed \(EF\)\./);
  assert.match(counted(9), /: 9 kept all the way, 1 changed \(EF\)\./);
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

Deno.test("the ICMP message's own byte shows that lower bits were kept, and nothing else", () => {
  for (let tos = 0; tos < 256; tos += 4) {
    for (let icmpTos = 0; icmpTos < 256; icmpTos++) {
      // A Linux router copies four bits and sets the two highest.
      const isWhole = icmpTos === (tos & 0x1e | 0xc0);
      assert.equal(keptLowerBits(tos, icmpTos), isWhole && (tos & 0x1c) !== 0, `${tos} ${icmpTos}`);
    }
  }
  assert.ok(keptLowerBits(EF, 0xd8));
  for (const other of [0x18, 0xb8, 0x98, 0xf8, 0xd9]) assert.ok(!keptLowerBits(EF, other));
});

const lost = (path: readonly Hop[], tos: number): TracedPath =>
  traced(path, { failure: new Failure(Exit.timeout, "no answer") }, tos);

Deno.test("a mark that vanishes where others pass is dropped between two hops", () => {
  const kept = traced([router(1, 0), router(2, 0), router(3, 0), target(4, 0)], {}, 0);
  const tests: [name: string, all: TracedPath[], said: RegExp, count: RegExp][] = [
    [
      "one of two",
      [lost([router(1, EF), silent(2), silent(3)], EF), kept],
      /^EF is dropped between hop 1 \(10\.0\.0\.1\) and hop 2 \(10\.0\.0\.2\); DF passes\.$/m,
      /Of 2 marks: 1 dropped \(EF\), 1 kept all the way \(DF\)\.$/,
    ],
    [
      "several at one place",
      [
        lost([router(1, EF), silent(2)], EF),
        lost([router(1, AF41), silent(2)], AF41),
        kept,
      ],
      /EF, AF41 are dropped between hop 1 .* and hop 2 .*; DF passes\./,
      /2 dropped \(EF, AF41\), 1 kept/,
    ],
    [
      "behind a hop that is silent to all",
      [
        lost([router(1, EF), silent(2), silent(3)], EF),
        traced([router(1, 0), silent(2), router(3, 0), target(4, 0)], {}, 0),
      ],
      /EF is dropped between hop 1 .* and hop 3 .*; DF passes\./,
      /1 dropped/,
    ],
    [
      "before the first hop, the target being all that answers",
      [lost([silent(1)], EF), traced([silent(1), target(null, 0)], {}, 0)],
      /EF is dropped between this host and the target .*; DF passes\./,
      /1 dropped/,
    ],
    [
      "a mark that is lost later passes here",
      [lost([router(1, EF), silent(2)], EF), lost([router(1, 0), router(2, 0), silent(3)], 0)],
      /^EF is dropped between hop 1 .* and hop 2 .*; DF passes\.$/m,
      /1 dropped \(EF\), 1 no answer \(DF\)\.$/,
    ],
    [
      "the nearest answer counts, and all that pass",
      [
        lost([router(1, EF)], EF),
        traced([router(1, CS1), silent(2), router(3, CS1), target(4, CS1)], {}, CS1),
        kept,
      ],
      /EF is dropped between hop 1 .* and hop 2 .*; CS1, DF pass\./,
      /1 dropped/,
    ],
    [
      "behind the last hop that answered",
      [lost([router(1, EF), router(2, EF), silent(3)], EF), kept],
      /EF is dropped between hop 2 .* and hop 3 .*; DF passes\./,
      /1 dropped/,
    ],
    ...[[0, 1], [1, 0]].map((order): [string, TracedPath[], RegExp, RegExp] => [
      "a target at an unknown distance is the farthest",
      [
        lost([router(1, EF)], EF),
        ...order.map((at) => [traced([target(null, CS1)], {}, CS1), kept][at]),
      ],
      /EF is dropped between hop 1 .* and hop 2 /,
      /1 dropped/,
    ]),
    [
      "many pass",
      [lost([router(1, EF)], EF), ...Array<TracedPath>(5).fill(kept)],
      /; 5 marks pass\./,
      /1 dropped/,
    ],
    [
      "four pass",
      [lost([router(1, EF)], EF), ...Array<TracedPath>(4).fill(kept)],
      /; DF, DF, DF, DF pass\./,
      /1 dropped/,
    ],
  ];
  for (const [name, all, said, count] of tests) {
    const text = pathReport(all, true, 80).trimEnd().replaceAll(/\n(?=\S)/g, " ");
    assert.match(pathReport(all, true, 1000), said, name);
    assert.match(text, count, name);
  }
  // Nobody knows why all are silent, or what became of one that was interrupted.
  const silence = [lost([router(1, EF), silent(2)], EF), lost([router(1, 0), silent(2)], 0)];
  assert.doesNotMatch(pathReport(silence, true, 80), /dropped/);
  assert.match(pathReport(silence, true, 80), /Of 2 marks: 2 no answer\.\n$/);
  const interrupted = traced([router(1, EF)], { failure: new Failure(130, "") });
  assert.doesNotMatch(pathReport([interrupted, kept], true, 80), /dropped/);
});

Deno.test("only a hop that was probed by a mark that passed it is called partly silent", () => {
  const whole = traced([router(1, 0), router(2, 0), target(3, 0)], {}, 0);
  const silentAt2 = traced([router(1, CS1), silent(2), target(3, CS1)], {}, CS1);
  const said = (...all: TracedPath[]) => /^Hop .*$/m.exec(pathReport(all, true, 80))?.[0] ?? null;
  assert.equal(
    said(whole, silentAt2),
    "Hop 2 (10.0.0.2) is partly silent: it answered 1 of 2 probes.",
  );
  assert.equal(said(whole, whole), null);
  assert.equal(said(silentAt2, silentAt2), null);
  assert.equal(said(whole, traced([router(1, EF)])), null);
  assert.equal(said(whole, lost([router(1, EF), silent(2)], EF)), null);
  const skipped = traced([router(1, EF), { ...silent(2), waited: null }, target(3, EF)]);
  assert.equal(said(whole, skipped), null);
  const farther = traced([router(1, EF), target(null, EF)]);
  assert.doesNotMatch(pathReport([farther, lost([router(1, EF)], EF)], true, 80), /null/);
  assert.doesNotMatch(
    pathReport([farther, lost([router(1, EF), { ...silent(2), hop: null }], EF)], true, 80),
    /null|partly/,
  );
});

Deno.test("hops that stay silent are named with the time that they were given", () => {
  const tests: [path: Hop[], said: string | null][] = [
    [[router(1, EF), target(2)], null],
    [[silent(1), target(2)], "No answer within 5 s from hop 1."],
    [[silent(1), silent(2), silent(3), target(4)], "No answer within 5 s from hops 1 to 3."],
    [
      [silent(1, 1000), silent(2, 2413.37), target(3)],
      "No answer within 1 s from hop 1. No answer within 2.4 s from hop 2.",
    ],
    // What is behind the target is no hop.
    [[silent(1), target(2), silent(3)], "No answer within 5 s from hop 1."],
    [[silent(1), silent(2), target(null)], "No answer within 5 s from hops 1, 2."],
    [[router(1, EF), silent(2)], "No answer within 5 s from hop 2."],
  ];
  for (const [path, said] of tests) {
    const found = /No answer .*(?=\n)/.exec(pathReport([traced(path)], false, 1000))?.[0] ?? null;
    assert.equal(found, said);
  }
  const some = traced([silent(1, 1000), silent(2, 200), target(3, EF)]);
  const other = traced([silent(1, 5000), router(2, 0), target(3, 0)], {}, 0);
  assert.match(pathReport([some, other], true, 80), /\nNo answer within 5 s from hop 1\.\n/);
});

Deno.test("numbers of hops, those that follow each other as a range", () => {
  const tests: [hops: (number | null)[], text: string][] = [
    [[], ""],
    [[3], "hop 3"],
    [[3, 4], "hops 3, 4"],
    [[3, 4, 5], "hops 3 to 5"],
    [[1, 3, 4, 5, 9], "hops 1, 3 to 5, 9"],
    [[null], "the target"],
    [[10, null], "hop 10 and the target"],
  ];
  for (const [hops, text] of tests) assert.equal(hopList(hops), text);
  assert.deepEqual([200, 1000, 4999, 50].map(shortSeconds), ["0.2 s", "1 s", "5 s", "0.05 s"]);
});

Deno.test("a silent hop is open if its answer can change what is said", () => {
  const tests: [name: string, path: Hop[], open: number[]][] = [
    ["all answer", [router(1, EF), target(2, EF)], []],
    ["its two ends agree", [router(1, EF), silent(2), router(3, EF)], []],
    ["its two ends differ", [router(1, EF), silent(2), silent(3), router(4, CS1)], [2, 3]],
    ["this host is an end", [silent(1), router(2, EF)], []],
    ["this host is an end that differs", [silent(1), router(2, CS1)], [1]],
    ["no farther hop shows the mark", [router(1, EF), silent(2), target(3)], [2]],
    ["hops that do not show it are no ends", [router(1, null), silent(2), router(3, EF)], []],
    ["the nearest end counts", [router(1, EF), router(2, 0), silent(3), router(4, 0)], []],
    ["nothing answers behind it", [router(1, EF), silent(2), silent(3), silent(4)], [2]],
    ["nothing answers at all", [silent(1), silent(2)], [1]],
    ["a change behind an end that agrees", [silent(1), router(2, EF), silent(3), router(4, 0)], [
      3,
    ]],
  ];
  for (const [name, path, open] of tests) {
    assert.deepEqual(openHops({ mark: markOf(EF), path }), open, name);
  }
});

Deno.test("a target that answers a fresh port only is said, with the marks if they differ", () => {
  const fresh = { ...traced([router(1, EF), target(null, EF)]), isFreshPort: true };
  const words = "The target answered only another port than the probes had";
  assert.ok(pathReport([fresh], false, 1000).includes(`. ${words}, as behind a firewall`));
  const other = traced([router(1, 0), target(2, 0)], {}, 0);
  assert.ok(pathReport([fresh, other], true, 1000).includes(`\n${words} (EF), as behind`));
  assert.ok(!pathReport([other], false, 1000).includes("another port"));
});

Deno.test("the table ends with the last answer, and a target at an unknown distance has its row", () => {
  const far = traced([router(1, EF), target(null, EF)]);
  const near = traced([router(1, 0), target(2, 0), silent(3), silent(4)], {}, 0);
  const rows = pathReport([far, near], true, 80).split("\n").map((row) => row.slice(0, 3));
  assert.deepEqual(rows.slice(0, 6), ["hop", "  1", "  2", "  3", "  4", "  ?"]);
  const closed = pathReport([lost([router(1, EF), silent(2)], EF), near], true, 80);
  assert.deepEqual(closed.split("\n").slice(0, 3).map((row) => row.slice(0, 3)), [
    "hop",
    "  1",
    "  2",
  ]);
  assert.doesNotMatch(closed, /^ {2}3/m);
});

Deno.test("all marks of a stretch tell its behaviour, those that are kept too", () => {
  const said = (...all: TracedPath[]) => pathReport(all, true, 1000);
  const ef = traced([router(1, EF), router(2, 0x18)]);
  assert.match(said(ef), /EF → 6, as by Bleach-ToS-Precedence or Bleach-some-ToS or Re-mark-DSCP /);
  const kept = traced([router(1, 0xc8), router(2, 0xc8)], {}, 0xc8);
  assert.match(said(ef, kept), /EF → 6, as by Bleach-some-ToS \(RFC 9435, 4\.2\.1\)\./);
  // One that is not seen there says nothing.
  const unseen = traced([router(1, 0xc8), silent(2)], {}, 0xc8);
  assert.match(said(ef, unseen), / or Bleach-some-ToS or /);
  const before = traced([router(1, 0x18)]);
  assert.match(
    said(before, traced([router(1, 0xc8)], {}, 0xc8)),
    /host and hop 1 .*Bleach-some-ToS \(/,
  );
  const swinging = traced([router(1, EF), router(2, CS1), router(3, EF)]);
  const text = said(swinging, kept);
  assert.match(
    text,
    /^EF was received as EF .*: the hops disagree, as if packets took several ways\.$/m,
  );
  assert.doesNotMatch(text, /→/);
});
