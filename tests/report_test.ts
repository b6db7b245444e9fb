import assert from "node:assert/strict";
import { markOf } from "../ffi/mod.ts";
import type { Arrival, Exchange, Reply, Sent } from "../src/exchange.ts";
import { Exit, Failure } from "../src/failure.ts";
import { parseArguments } from "../src/options.ts";
import { sinkFor } from "../src/output.ts";
import { json, markedReport, outcomeReport } from "../src/report.ts";
import { parseTarget } from "../src/target.ts";
import { NOT_OBSERVED } from "../src/verdict.ts";

const EF = markOf(0xb8);
const PACKET = {
  tos: 0xb8,
  length: 152,
  payload: 100,
  sequence: 1001,
  isWrapped: false,
  outerTos: null,
  linkHeader: 14,
  isRedirected: false,
};
const SENT: Sent = {
  ...NOT_OBSERVED,
  proved: true,
  packets: [PACKET],
  bytes: { seen: 100, sent: 100 },
};
const ARRIVED: Arrival = {
  syn: 0,
  ack: null,
  data: 0xb8,
  isOther: false,
  nat: null,
  marked: [0xb8],
  kept: true,
  changes: [],
  handshake: null,
  ecn: null,
};
const REPLY: Reply = {
  status: 200,
  reason: "OK",
  headers: [],
  trailers: [],
  tos: null,
  bodyBytes: 154,
  complete: true,
};
const end = (port: number) => ({ transport: "tcp" as const, hostname: "127.0.0.1", port });
// What the report reads of a connection; it is a value here, no socket.
const CONNECTION = {
  localAddr: end(52614),
  remoteAddr: end(8086),
  readBack: 0xb8,
  fd: 24,
  device: "wg0",
} as unknown as Exchange["connection"];

const REMOTE = {
  connection: {
    ...CONNECTION,
    remoteAddr: { ...end(80), hostname: "192.0.2.2" },
  } as unknown as Exchange[
    "connection"
  ],
};

function exchange(more: Partial<Exchange> = {}): Exchange {
  return {
    target: parseTarget("http://127.0.0.1:8086/"),
    mark: EF,
    markSyn: false,
    expect: null,
    started: 0,
    connection: CONNECTION,
    reply: REPLY,
    milliseconds: { connect: 1, firstByte: 2, total: 4 },
    sent: SENT,
    arrived: ARRIVED,
    returned: { sent: null, arrived: null, kept: null },
    failure: null,
    ...more,
  };
}

/** The report's lines, each with its continuation, by label. */
function lines(more: Partial<Exchange> = {}): Record<string, string> {
  const text = outcomeReport(exchange(more));
  for (const line of text.split("\n")) assert.ok(line.length <= 80, line);
  return Object.fromEntries(
    text.replaceAll(/\n {11}/g, " ").trimEnd().split("\n")
      .map((line) => [line.slice(0, 11).trim(), line.slice(11)]),
  );
}

Deno.test("a newcomer's first screen is five lines", () => {
  assert.equal(
    markedReport(exchange(), true) + outcomeReport(exchange()),
    `connected  127.0.0.1:52614 → 127.0.0.1:8086, the built-in server
mark       EF = DSCP 46 = byte 0xB8; the kernel reads back 0xB8
sent       1 packet with 0xB8, read from its IP header: proved
arrived    request 0xB8: the mark survived; SYN 0x00, as it was sent
           (--mark-syn marks it too)
reply      200 OK, 154 bytes in 4.0 ms
`,
  );
  assert.equal(markedReport(exchange({ connection: null }), true), "");
  assert.equal(outcomeReport(exchange({ connection: null })), "");
  assert.doesNotMatch(markedReport(exchange(), false), /built-in/);
  assert.match(markedReport(exchange({ mark: markOf(13 << 2) }), false), /no name = DSCP 13 = /);
});

Deno.test("the line of what was sent says how much is known", () => {
  const tunnelled = { ...PACKET, isWrapped: true, outerTos: 0 };
  const cases: [what: string, sent: Partial<Sent>, line: RegExp][] = [
    [
      "nothing",
      NOT_OBSERVED,
      /^not observed: the kernel returned no copies \(the address is wg0's\)\. .*WireGuard.*tstamp_allow_data=0$/,
    ],
    [
      "two",
      { packets: [PACKET, PACKET] },
      /^2 packets with 0xB8, read from their IP headers: proved$/,
    ],
    [
      "again",
      { packets: [PACKET, PACKET, PACKET], repeats: 2 },
      /^3 packets with 0xB8, 2 of them sent again, read/,
    ],
    ["ECN", { packets: [{ ...PACKET, tos: 0xba }] }, /0xBA.*proved \(its two lowest bits are ECN/],
    [
      "changed",
      { proved: false, wrong: 0x20, packets: [{ ...PACKET, tos: 0x20 }] },
      /0x20, .*: NOT the mark that was set$/,
    ],
    [
      "ECN on one of two",
      { packets: [PACKET, { ...PACKET, tos: 0xba }] },
      /its two lowest bits are ECN/,
    ],
    ["two marks", { proved: false, packets: [PACKET, { ...PACKET, tos: 0x20 }] }, /0xB8 and 0x20/],
    [
      "tunnel",
      { proved: false, outerTos: 0, packets: [tunnelled] },
      /inside a tunnel whose packets carry 0x00: NOT/,
    ],
    [
      "taken",
      { proved: null, takenBy: "a program on this host" },
      /handed to a program on this host, whose own packets are not observed$/,
    ],
    ["taken and changed", { proved: false, takenBy: "a program on this host" }, /NOT the mark/],
    ["a part", { proved: null, bytes: { seen: 3, sent: 9 } }, /: proved for 3 of 9 bytes$/],
    [
      "a part of ?",
      { proved: null, bytes: { seen: 3, sent: null } },
      /: proved for 3 of \? bytes$/,
    ],
  ];
  for (const [what, sent, line] of cases) {
    assert.match(lines({ sent: { ...SENT, ...sent } }).sent, line, what);
  }
  const failed = lines({ sent: NOT_OBSERVED, reply: null, arrived: null });
  assert.deepEqual(Object.keys(failed), ["handshake"]);
});

Deno.test("the line of what arrived says what the server knows, and of whom", () => {
  const two = { ...SENT, packets: [PACKET, PACKET] };
  const cases: [what: string, arrived: Partial<Arrival>, more: Partial<Exchange>, line: RegExp][] =
    [
      [
        "marked",
        { syn: 0xb8, handshake: true },
        { markSyn: true },
        /^request 0xB8, SYN 0xB8: the mark survived$/,
      ],
      ["ECN on the SYN", { syn: 0x02 }, {}, /; SYN 0x02, as it was sent/],
      ["a SYN of LE", { syn: 4 }, {}, /^request 0xB8, SYN 0x04: /],
      [
        "first of two",
        {},
        { sent: two },
        /the mark survived on the packet that is reported; SYN 0x00/,
      ],
      [
        "handshake only",
        { data: null, kept: null, ack: 0 },
        {},
        /^SYN 0x00, ACK 0x00 at the server; whether .* unknown/,
      ],
      [
        "marked handshake only",
        { syn: 0xb8, ack: 0xb8, data: null },
        { markSyn: true },
        /survived on the handshake$/,
      ],
      [
        "changed",
        {
          data: 0,
          kept: false,
          changes: [{ packet: "data", sent: 0xb8, wanted: 0xb8, arrived: 0 }],
        },
        {},
        /^request 0x00: NOT the mark that was sent; SYN 0x00, as it was sent/,
      ],
      [
        "other",
        { isOther: true, kept: null },
        {},
        /on another connection: a proxy is in between, or a firewall/,
      ],
      [
        "NAT",
        { nat: "203.0.113.5:40112" },
        {},
        /through NAT: the server sees 203\.0\.113\.5:40112$/,
      ],
      ["hostile NAT", { nat: "\x1b[2J" }, {}, /sees \\x1b\[2J$/],
      ["ECN", { ecn: "bleached" }, {}, /ECN bleached on the way$/],
      ["expected", {}, { expect: markOf(0x88) }, /^request 0xB8: as expected/],
      [
        "not as expected",
        { data: 0, kept: false, changes: [{ packet: "data", sent: 0, wanted: 0xb8, arrived: 0 }] },
        { expect: EF },
        /^request 0x00: NOT the mark that is expected/,
      ],
      ["tunnel", {}, { sent: { ...SENT, outerTos: 0 } }, /the mark inside the tunnel survived/],
      ["tunnel with the mark", {}, { sent: { ...SENT, outerTos: 0xb8 } }, /: the mark survived/],
      [
        "a marked SYN that was not",
        { syn: 0xb8, kept: false, changes: [{ packet: "SYN", sent: 0, wanted: 0, arrived: 0xb8 }] },
        {},
        /^request 0xB8, SYN 0xB8: NOT/,
      ],
    ];
  for (const [what, arrived, more, line] of cases) {
    assert.match(lines({ arrived: { ...ARRIVED, ...arrived }, ...more }).arrived, line, what);
  }
});

Deno.test("the handshake has a line if the server says nothing", () => {
  assert.match(lines({ arrived: null }).handshake, /^unmarked: .*--mark-syn marks it too$/);
  assert.match(
    lines({ arrived: null, markSyn: true }).handshake,
    /^set before the SYN; not proved/,
  );
  assert.equal(lines().handshake, undefined);
});

Deno.test("the line of the reply says how much came, how marked, and where it leads", () => {
  const cases: [what: string, reply: Partial<Reply>, more: Partial<Exchange>, line: RegExp][] = [
    ["one byte", { bodyBytes: 1 }, {}, /^200 OK, 1 byte in 4\.0 ms$/],
    ["no reason", { reason: "" }, {}, /^200, 154/],
    ["cut", { complete: false }, {}, /only 154 bytes/],
    ["unread", { complete: false }, { failure: new Failure(Exit.httpError, "") }, /OK, 154 bytes/],
    [
      "marked",
      {},
      { returned: { sent: null, arrived: 0x20, kept: null } },
      /, its first packet marked 0x20$/,
    ],
    [
      "unread",
      {},
      { ...REMOTE, returned: { sent: 0xb8, arrived: null, kept: null } },
      /, sent with 0xB8 \(only root sees what came back\)$/,
    ],
    ["kept within this host", {}, { returned: { sent: 0xb8, arrived: 0xb8, kept: true } }, /ms$/],
    [
      "kept",
      {},
      { ...REMOTE, returned: { sent: 0xb8, arrived: 0xb8, kept: true } },
      /, its first packet marked 0xB8$/,
    ],
    [
      "changed",
      {},
      { returned: { sent: 0xb8, arrived: 0, kept: false } },
      /sent with 0xB8, came back with 0x00: NOT the mark that the server sent$/,
    ],
    [
      "redirect",
      { status: 301, headers: [["location", "/\x1b"]] },
      {},
      /; leads to \/\\x1b, not followed$/,
    ],
    [
      "redirect 300",
      { status: 300, headers: [["location", "/a"], ["location", "/b"]] },
      {},
      /leads to \/a, /,
    ],
    ["no redirect below 300", { status: 299, headers: [["location", "/a"]] }, {}, /ms$/],
    ["no redirect from 400", { status: 400, headers: [["location", "/a"]] }, {}, /ms$/],
    ["redirect 399", { status: 399, headers: [["location", "/a"]] }, {}, /not followed$/],
    ["hostile", { reason: "\x1b[2J" }, {}, /^200 \\x1b\[2J/],
  ];
  for (const [what, reply, more, line] of cases) {
    assert.match(lines({ reply: { ...REPLY, ...reply }, ...more }).reply, line, what);
  }
});

Deno.test("JSON escapes what would act on a terminal, and writes null for what is unknown", () => {
  const unsafe = [
    "\x7f",
    "\x9f",
    "\u061c",
    "\u200e",
    "\u200f",
    "\u2028",
    "\u202e",
    "\u2066",
    "\u2069",
  ];
  for (const character of unsafe) {
    const line = json(exchange({ reply: { ...REPLY, reason: character } }), null);
    assert.ok(!line.includes(character) && JSON.parse(line).reply.reason === character);
  }
  const line = json(exchange({ arrived: { ...ARRIVED, isOther: true } }), null, { round: 3 });
  const { arrived, returned, round, descriptor, sent } = JSON.parse(line);
  assert.deepEqual([arrived, round, descriptor], [null, 3, 24]);
  assert.deepEqual(returned, { sent: null, arrived: null, kept: null });
  assert.deepEqual(sent.packets, [{ tos: 0xb8, length: 152 }]);
  const failed = JSON.parse(json(exchange({ connection: null, reply: null }), new Failure(7, "x")));
  assert.deepEqual(
    [failed.local, failed.reply, failed.mark.readBack, failed.mark.handshake, failed.error.code],
    [null, null, null, null, 7],
  );
  const changed = [{ packet: "data" as const, sent: 0xb8, wanted: 0xb8, arrived: 0 }];
  const bleached = JSON.parse(json(exchange({ arrived: { ...ARRIVED, changes: changed } }), null));
  assert.deepEqual(bleached.arrived.behaviour, ["Bleach-DSCP"]);
  assert.deepEqual(JSON.parse(json(null, new Failure(3, "bad"))), {
    error: { code: 3, message: "bad" },
  });
});

Deno.test("JSON says which server answered, with trailers if there are any, and rounds fractions", () => {
  const parsed = (more: Partial<Reply>, context = {}) =>
    JSON.parse(json(exchange({ reply: { ...REPLY, ...more } }), null, context));
  assert.equal(parsed({}).server, "remote");
  assert.equal(parsed({}, { isBuiltIn: true }).server, "built-in");
  assert.equal("trailers" in parsed({}).reply, false);
  assert.deepEqual(parsed({ trailers: [["a", "b"]] }).reply.trailers, [["a", "b"]]);
  assert.equal("tos" in parsed({}).reply, false);
  assert.equal(parsed({ tos: 0 }).reply.tos, 0);
  const milliseconds = { connect: 0.123456789, firstByte: 12345678, total: 1.5 };
  assert.deepEqual(JSON.parse(json(exchange({ milliseconds }), null)).milliseconds, {
    connect: 0.123457,
    firstByte: 12345678,
    total: 1.5,
  });
  const changes = [{ packet: "data" as const, sent: 50 << 2, wanted: 200, arrived: 2 << 2 }];
  const { arrived } = JSON.parse(json(exchange({ arrived: { ...ARRIVED, changes } }), null));
  assert.deepEqual(arrived.behaviour, ["Bleach-ToS-Precedence", "Re-mark-DSCP"]);
});

Deno.test("-f refuses a status from 400 up, and a terminal gets no binary body", () => {
  const options = { ...parseArguments(["-f"]) };
  const begin = (status: number) => () => sinkFor(options).begin!({ ...REPLY, status });
  assert.doesNotThrow(begin(399));
  assert.throws(begin(400), (error) => error instanceof Failure && error.code === 22);
  assert.equal(sinkFor(parseArguments([])).begin, undefined);
  for (const dropped of [["--json"], ["--trace"], ["-n", "2"]]) {
    assert.equal(sinkFor(parseArguments(dropped)).body, undefined, `${dropped}`);
  }
  assert.notEqual(sinkFor(parseArguments([])).body, undefined);
});
