import assert from "node:assert/strict";
import { markOf, type SentPacket } from "../ffi/mod.ts";
import type { Arrival, ArrivedChange, Exchange, Reply, Sent } from "../src/exchange.ts";
import { Exit, Failure } from "../src/failure.ts";
import { parseTarget } from "../src/target.ts";
import {
  assessArrival,
  assessReturn,
  assessSent,
  bytesCovered,
  coversAllData,
  isOurs,
  isWrongMark,
  moreSevere,
  NOT_OBSERVED,
  requestFailure,
} from "../src/verdict.ts";

const [EF, AF41, DF] = [markOf(0xb8), markOf(0x88), markOf(0)];
const OURS: Deno.NetAddr = { transport: "tcp", hostname: "192.0.2.1", port: 40000 };
const THEIRS: Deno.NetAddr = { transport: "tcp", hostname: "192.0.2.2", port: 80 };

function packet(more: Partial<SentPacket> = {}): SentPacket {
  return {
    tos: 0xb8,
    length: 152,
    payload: 100,
    sequence: 1001,
    isWrapped: more.outerTos !== undefined,
    outerTos: null,
    linkHeader: 14,
    isRedirected: false,
    ...more,
  };
}

function replyWith(headers: Record<string, string>, tos: number | null = null): Reply {
  return {
    status: 200,
    reason: "OK",
    headers: Object.entries(headers),
    trailers: [],
    tos,
    bodyBytes: 0,
    complete: true,
  };
}

const SENT: Sent = {
  ...NOT_OBSERVED,
  proved: true,
  packets: [packet()],
  bytes: { seen: 100, sent: 100 },
};

function exchange(more: Partial<Exchange> = {}): Exchange {
  return {
    target: parseTarget("http://192.0.2.2/"),
    mark: EF,
    markSyn: false,
    expect: null,
    started: 0,
    connection: null,
    reply: null,
    milliseconds: { connect: null, firstByte: null, total: null },
    sent: SENT,
    arrived: null,
    returned: { sent: null, arrived: null, kept: null },
    failure: null,
    ...more,
  };
}

Deno.test("bytes are counted once, whatever the order, and packets that bring none are repeats", () => {
  const at = (sequence: number, payload: number) => packet({ sequence, payload });
  const cases: [packets: SentPacket[], seen: number, repeats: number][] = [
    [[], 0, 0],
    [[at(1, 100)], 100, 0],
    [[at(1, 100), at(101, 50)], 150, 0],
    [[at(101, 50), at(1, 100)], 150, 0],
    [[at(1, 100), at(1, 100), at(1, 100)], 100, 2],
    [[at(1, 100), at(51, 100)], 150, 0],
    [[at(1, 100), at(51, 50)], 100, 1],
    [[at(1, 100), at(201, 100)], 200, 0],
    [[at(0xffffffce, 100), at(50, 10)], 110, 0],
    [[at(1, 0)], 0, 0],
  ];
  for (const [packets, seen, repeats] of cases) {
    assert.deepEqual(bytesCovered(packets), { seen, repeats });
  }
});

Deno.test("the mark is proved if all bytes were seen with it, and only then", () => {
  const cases: [
    what: string,
    packets: SentPacket[],
    sent: number | null,
    wanted: Partial<Sent>,
  ][] = [
    ["all", [packet()], 100, { proved: true }],
    ["nothing seen", [], 100, { proved: null }],
    ["nothing sent", [], 0, { proved: null }],
    ["a part", [packet()], 101, { proved: null }],
    ["an unknown size", [packet()], null, { proved: null }],
    ["ECN", [packet({ tos: 0xba })], 100, { proved: true, wrong: null }],
    ["another mark", [packet({ tos: 0x20 })], 100, { proved: false, wrong: 0x20 }],
    ["another mark on a part", [packet({ tos: 0x20 })], 300, { proved: false, wrong: 0x20 }],
    ["a tunnel with the mark", [packet({ outerTos: 0xb8 })], 100, { proved: true, outerTos: 0xb8 }],
    ["a tunnel without", [packet({ outerTos: 0 })], 100, {
      proved: false,
      outerTos: 0,
      wrong: null,
    }],
    [
      "two tunnels",
      [packet({ outerTos: 0xb8 }), packet({ outerTos: 0x28, sequence: 1101 })],
      200,
      { proved: false, outerTos: 0x28 },
    ],
    ["a tunnel that hides its mark", [packet({ outerTos: null })], 100, {
      proved: null,
      takenBy: "a tunnel",
    }],
    ["a tunnel device", [packet({ linkHeader: 0 })], 100, {
      proved: null,
      takenBy: "a tunnel device",
    }],
    ["a proxy", [packet({ isRedirected: true })], 100, {
      proved: null,
      takenBy: "a program on this host",
    }],
    ["a proxy and another mark", [packet({ isRedirected: true, tos: 0 })], 100, {
      proved: false,
      takenBy: "a program on this host",
    }],
  ];
  for (const [what, packets, dataSent, wanted] of cases) {
    const sent = assessSent({ sent: packets, dataSent, remoteAddr: THEIRS }, exchange());
    for (const [key, value] of Object.entries(wanted)) {
      assert.equal(sent[key as keyof Sent], value, `${what}: ${key}`);
    }
    assert.equal(sent.bytes.sent, dataSent);
  }
});

Deno.test("a connection that leads elsewhere than the URL says was handed to a program here", () => {
  const end = (hostname: string, port: number): Deno.NetAddr => ({
    transport: "tcp",
    hostname,
    port,
  });
  const cases: [url: string, remote: Deno.NetAddr, isTaken: boolean][] = [
    ["http://192.0.2.1:8080/", end("192.0.2.1", 8080), false],
    ["http://192.0.2.1:8080/", end("127.0.0.1", 3128), true],
    ["http://192.0.2.1:8080/", end("127.0.0.1", 8080), true],
    ["http://192.0.2.1:8080/", end("192.0.2.1", 3128), true],
    ["http://name.test:8080/", end("127.0.0.1", 8080), false],
    ["http://name.test:8080/", end("127.0.0.1", 3128), true],
    ["http://0.0.0.0:8080/", end("127.0.0.1", 8080), false],
    ["http://[::]:8080/", end("::1", 8080), false],
    ["http://[::]:8080/", end("::1", 8081), true],
    ["http://[::ffff:192.0.2.1]:8080/", end("192.0.2.1", 8080), false],
    ["http://[::ffff:192.0.2.1]:8080/", end("::ffff:192.0.2.1", 8080), false],
    ["http://[fe80::1%25eth0]:8080/", end("fe80::1", 8080), false],
    ["http://[fe80::2%25eth0]:8080/", end("fe80::1", 8080), true],
  ];
  for (const [url, remoteAddr, isTaken] of cases) {
    const asked = exchange({ target: parseTarget(url) });
    const { takenBy, proved } = assessSent(
      { sent: [packet()], dataSent: 100, remoteAddr },
      asked,
    );
    assert.deepEqual(
      [takenBy, proved],
      isTaken ? ["a program on this host", null] : [null, true],
      `${url} ${remoteAddr.hostname}:${remoteAddr.port}`,
    );
  }
});

Deno.test("what leaves with the expected mark is right, and with a third is not", () => {
  const asked = exchange({ mark: DF, expect: EF });
  const judge = (tos: number) =>
    assessSent({ sent: [packet({ tos })], dataSent: 100, remoteAddr: THEIRS }, asked);
  assert.deepEqual([judge(0).proved, judge(0xb8).proved, judge(0x88).proved], [true, true, false]);
  assert.equal(judge(0x88).wrong, 0x88);
});

/** The arrival for a server's headers. */
function arrival(
  headers: Record<string, string>,
  more: Partial<Exchange> = {},
  localAddr: Deno.NetAddr = OURS,
): Arrival | null {
  return assessArrival(exchange({ reply: replyWith(headers), ...more }), localAddr);
}

Deno.test("what the server reports is compared with what was sent, packet by packet", () => {
  const cases: [
    what: string,
    bytes: (string | null)[],
    more: Partial<Exchange>,
    kept: boolean | null,
    changed: string[],
    handshake: boolean | null,
  ][] = [
    ["all as sent", ["0x00", null, "0xB8"], {}, true, [], null],
    ["handshake only", ["0x00", "0x00", null], {}, null, [], null],
    ["bleached data", ["0x00", null, "0x00"], {}, false, ["data"], null],
    ["a marked SYN that was not", ["0xB8", null, "0xB8"], {}, false, ["SYN"], null],
    ["ECN on the SYN", ["0x02", null, "0xB8"], {}, true, [], null],
    ["an ACK that is the request", ["0x00", "0xB8", null], {}, null, [], null],
    ["a changed ACK", ["0x00", "0x20", null], {}, false, ["ACK"], null],
    ["marked all", ["0xB8", "0xB8", "0xB8"], { markSyn: true }, true, [], true],
    ["marked handshake only", ["0xB8", "0xB8", null], { markSyn: true }, true, [], true],
    ["a bleached SYN", ["0x00", null, "0xB8"], { markSyn: true }, false, ["SYN"], false],
    ["a bleached ACK", ["0xB8", "0x00", null], { markSyn: true }, false, ["ACK"], false],
    ["bleached data only", ["0xB8", null, "0x00"], { markSyn: true }, false, ["data"], true],
    ["no SYN", [null, null, "0xB8"], { markSyn: true }, true, [], null],
    ["expected remap", ["0x00", null, "0x88"], { expect: AF41 }, true, [], null],
    [
      "an expected remap that failed",
      ["0x00", null, "0xB8"],
      { expect: AF41 },
      false,
      ["data"],
      null,
    ],
    [
      "a remap of what this host marks",
      ["0x00", null, "0x88"],
      { mark: DF, expect: AF41, sent: { ...SENT, packets: [packet({ tos: 0xba })] } },
      true,
      [],
      null,
    ],
    ["a rule that marks all", ["0xB8", null, "0xB8"], { mark: DF, expect: EF }, true, [], null],
    [
      "a rule that marks none",
      ["0x00", null, "0x00"],
      { mark: DF, expect: EF },
      false,
      ["data"],
      null,
    ],
    [
      "a rule that marks a third",
      ["0x20", null, "0xB8"],
      { mark: DF, expect: EF },
      false,
      ["SYN"],
      null,
    ],
  ];
  for (const [what, [syn, ack, data], more, kept, changed, handshake] of cases) {
    const headers = Object.fromEntries(
      Object.entries({ "arrived-syn": syn, "arrived-ack": ack, "arrived-data": data })
        .flatMap(([name, value]) => value === null ? [] : [[name, value]]),
    );
    const arrived = arrival(headers, more)!;
    assert.equal(arrived.kept, kept, what);
    assert.deepEqual(arrived.changes.map(({ packet }) => packet), changed, what);
    assert.equal(arrived.handshake, handshake, what);
  }
});

Deno.test("nothing arrived as long as a reply reports no byte", () => {
  const cases: Record<string, string>[] = [
    {},
    { "arrived-syn": "184" },
    { "arrived-syn": "0x1B8" },
    { "arrived-syn": "0xG8" },
    { "arrived-peer": "192.0.2.1:40000" },
  ];
  for (const headers of cases) assert.equal(arrival(headers), null, JSON.stringify(headers));
  assert.equal(assessArrival(exchange(), OURS), null);
  assert.equal(arrival({ "arrived-syn": "0xb8" })!.syn, 0xb8);
});

Deno.test("a report is about this connection by its sequence number, else by its address", () => {
  const us = "192.0.2.1:40000", other = "203.0.113.5:40112";
  const cases: [
    peer: string | null,
    sequence: string | null,
    more: Partial<Exchange>,
    isOther: boolean,
    nat: string | null,
  ][] = [
    [us, "1000", {}, false, null],
    [us, null, {}, false, null],
    [null, null, {}, false, null],
    [other, null, {}, true, null],
    [other, "1000", {}, false, other],
    [other, "2000", {}, true, null],
    [us, "2000", {}, true, null],
    [us, "nonsense", {}, false, null],
    [us, "4294967296", {}, false, null],
    ["\x1b[2J", "1000", {}, false, null],
    ["[2001:db8::1]:65535", "1000", {}, false, "[2001:db8::1]:65535"],
    [other, "", {}, true, null],
    // The copy of the first packet was lost: the one that was seen carries later bytes.
    [other, "950", {}, false, other],
    [other, "899", {}, true, null],
    [other, "1001", {}, true, null],
    [other, "1000", { sent: NOT_OBSERVED }, true, null],
    [us, "1000", { sent: NOT_OBSERVED }, false, null],
    [other, "1000", { sent: { ...SENT, bytes: { seen: 100, sent: null } } }, false, other],
    [other, "999", { sent: { ...SENT, bytes: { seen: 100, sent: null } } }, true, null],
    [other, "4294967295", { sent: { ...SENT, packets: [packet({ sequence: 0 })] } }, false, other],
  ];
  for (const [peer, sequence, more, isOther, nat] of cases) {
    const headers = {
      "arrived-data": "0x00",
      ...peer !== null && { "arrived-peer": peer },
      ...sequence !== null && { "arrived-sequence": sequence },
    };
    const arrived = arrival(headers, more)!;
    const what = `${peer} ${sequence}`;
    assert.deepEqual([arrived.isOther, arrived.nat], [isOther, nat], what);
    assert.deepEqual(
      [arrived.kept, arrived.changes.length],
      isOther ? [null, 0] : [false, 1],
      what,
    );
  }
  const mapped = { ...OURS, hostname: "::ffff:192.0.2.1" };
  assert.equal(arrival({ "arrived-syn": "0x00", "arrived-peer": us }, {}, mapped)!.isOther, false);
});

Deno.test("what a proxy reports of its own handshake proves nothing of ours", () => {
  const headers = {
    "arrived-syn": "0xB8",
    "arrived-data": "0xB8",
    "arrived-peer": "203.0.113.5:1",
  };
  const { handshake, kept, marked, ecn } = arrival(headers, { markSyn: true })!;
  assert.deepEqual([handshake, kept, marked, ecn], [null, null, [], null]);
});

Deno.test("ECN bits that the path changed are named, if all packets left with the same", () => {
  const cases: [sent: number[], arrived: string, ecn: Arrival["ecn"]][] = [
    [[0xb8], "0xB8", null],
    [[0xb8], "0xBB", null],
    [[0xba], "0xBA", null],
    [[0xba], "0xB8", "bleached"],
    [[0xb9], "0xB8", "bleached"],
    [[0xba], "0xB9", "mangled"],
    [[0xb9], "0xBA", "mangled"],
    [[0xba], "0xBB", "congestion experienced"],
    [[0xba, 0xb8], "0xB8", null],
    [[], "0xB8", null],
  ];
  for (const [tos, arrived, ecn] of cases) {
    const sent = { ...SENT, packets: tos.map((tos) => packet({ tos })) };
    assert.equal(arrival({ "arrived-data": arrived }, { sent })!.ecn, ecn, `${tos} ${arrived}`);
  }
});

Deno.test("a report covers a request of one packet, sent again or not", () => {
  const arrived = arrival({ "arrived-data": "0xB8" })!,
    handshake = arrival({ "arrived-syn": "0x00" })!;
  const sent = (packets: number, repeats: number) => ({
    ...SENT,
    packets: Array(packets).fill(packet()),
    repeats,
  });
  assert.equal(coversAllData(arrived, sent(1, 0)), true);
  assert.equal(coversAllData(arrived, sent(3, 2)), true);
  assert.equal(coversAllData(arrived, sent(2, 0)), false);
  assert.equal(coversAllData(arrived, sent(0, 0)), false);
  assert.equal(coversAllData(handshake, sent(1, 0)), false);
});

Deno.test("the reply came back as it was sent, changed, or nobody knows", () => {
  const ours = arrival({ "arrived-syn": "0x00" })!, other = { ...ours, isOther: true };
  const returned = (sent: number | null, arrived: number | null, kept: boolean | null = null) => ({
    sent,
    arrived,
    kept,
  });
  const cases: [tos: string | null, here: number | null, Arrival | null, unknown][] = [
    [null, null, null, returned(null, null)],
    [null, 0x20, null, returned(null, 0x20)],
    ["0xB8", null, ours, returned(0xb8, null)],
    ["0xB8", 0xb8, ours, returned(0xb8, 0xb8, true)],
    ["0xB8", 0xba, ours, returned(0xb8, 0xba, true)],
    ["0xB8", 0, ours, returned(0xb8, 0, false)],
    ["0x00", 0xb8, ours, returned(0, 0xb8, false)],
    ["0xB8", 0, other, returned(null, 0)],
    ["0xB8", 0, null, returned(null, 0)],
    ["B8", 0, ours, returned(null, 0)],
  ];
  for (const [tos, here, arrived, wanted] of cases) {
    const reply = replyWith(tos === null ? {} : { "reply-tos": tos }, here);
    assert.deepEqual(assessReturn(reply, arrived), wanted, `${tos} ${here}`);
  }
  assert.deepEqual(assessReturn(null, null), returned(null, null));
});

const change = (packet: ArrivedChange["packet"], sent: number, arrived: number, wanted = sent) => ({
  packet,
  sent,
  wanted,
  arrived,
});
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
const arrivedWith = (more: Partial<Arrival>) => ({ ...ARRIVED, ...more });
const OUR_REPLY = replyWith({ server: "dscp-get/0.3.0" });

Deno.test("each way in which a mark goes wrong has its code and its words", () => {
  const proof = { requireProof: true };
  const timeout = new Failure(Exit.timeout, "the request took longer than 1 second");
  const repeated: Sent = { ...SENT, repeats: 3, packets: Array(4).fill(packet()) };
  const cases: [
    what: string,
    Partial<Exchange>,
    { requireProof?: boolean },
    code: number,
    words: RegExp | null,
    hint?: RegExp,
  ][] = [
    ["all well", {}, {}, 0, null],
    [
      "left changed",
      { sent: { ...SENT, proved: false, wrong: 0x20 } },
      {},
      101,
      /^set 0xB8, left with 0x20/,
    ],
    [
      "tunnel",
      { sent: { ...SENT, proved: false, outerTos: 0 } },
      {},
      101,
      /inside a tunnel.* 0x00$/,
      /inherit/,
    ],
    [
      "left changed and arrived changed",
      {
        sent: { ...SENT, proved: false, wrong: 0x20 },
        arrived: arrivedWith({ changes: [change("data", 0xb8, 0x20)] }),
      },
      {},
      101,
      /left with/,
    ],
    [
      "data bleached on the path",
      { arrived: arrivedWith({ data: 0, changes: [change("data", 0xb8, 0)] }) },
      {},
      102,
      /^sent EF \(0xB8\), arrived DF \(0x00\): the path rewrote it, as by Bleach-DSCP \(RFC 9435, 4\.1\)$/,
      /try --mark-syn/,
    ],
    [
      "data changed, SYN marked",
      {
        markSyn: true,
        arrived: arrivedWith({ syn: 0xb8, data: 0x28, changes: [change("data", 0xb8, 0x28)] }),
      },
      {},
      102,
      /the path rewrote it, as by Re-mark-DSCP/,
      /^$/,
    ],
    [
      "SYN and data changed to different marks",
      {
        markSyn: true,
        arrived: arrivedWith({
          syn: 0x20,
          data: 0,
          changes: [change("SYN", 0xb8, 0x20), change("data", 0xb8, 0)],
        }),
      },
      {},
      102,
      /^sent EF \(0xB8\), arrived DF \(0x00\): the path rewrote it, as by Bleach-DSCP/,
      /^$/,
    ],
    [
      "SYN changed, request kept, nothing seen leaving",
      {
        sent: NOT_OBSERVED,
        markSyn: true,
        arrived: arrivedWith({ changes: [change("SYN", 0xb8, 0)] }),
      },
      {},
      102,
      /^SYN sent EF \(0xB8\), arrived DF \(0x00\): rewritten by this host or the path/,
    ],
    [
      "expected, but nobody reports",
      { expect: EF, reply: replyWith({}) },
      { requireProof: true },
      104,
      /does not report what arrived/,
    ],
    [
      "expected and reported",
      { expect: EF, reply: OUR_REPLY, arrived: ARRIVED },
      { requireProof: true },
      0,
      null,
    ],
    [
      "data changed, nothing seen leaving",
      {
        sent: NOT_OBSERVED,
        arrived: arrivedWith({ data: 0x28, changes: [change("data", 0xb8, 0x28)] }),
      },
      {},
      102,
      /this host or the path/,
    ],
    [
      "data changed in one of several ways",
      {
        markSyn: true,
        arrived: arrivedWith({ syn: 0xb8, data: 0x18, changes: [change("data", 0xb8, 0x18)] }),
      },
      {},
      102,
      /as by Bleach-ToS-Precedence or/,
      /-d EF,50/,
    ],
    [
      "Wi-Fi",
      { arrived: arrivedWith({ data: 0xa0, changes: [change("data", 0xb8, 0xa0)] }) },
      {},
      102,
      /as by Bleach-low or/,
      /^Wi-Fi/,
    ],
    [
      "SYN changed, request kept",
      { markSyn: true, arrived: arrivedWith({ changes: [change("SYN", 0xb8, 0)] }) },
      {},
      102,
      /^SYN sent EF \(0xB8\), arrived DF \(0x00\), but the request kept its mark: a SYN proxy/,
    ],
    [
      "SYN marked by a rule, request kept",
      { arrived: arrivedWith({ syn: 0xb8, changes: [change("SYN", 0, 0xb8)] }) },
      {},
      102,
      /^SYN sent DF .* arrived EF .*: it was marked on its way out of this host, or on the path$/,
    ],
    [
      "ACK or request changed",
      { arrived: arrivedWith({ ack: 0x88, data: null, changes: [change("ACK", 0, 0x88)] }) },
      {},
      102,
      /^the ACK or the request arrived with AF41 \(0x88\), and neither was sent so: rewritten/,
    ],
    [
      "ACK changed, with SYN cookies",
      {
        arrived: arrivedWith({
          syn: null,
          ack: 0x88,
          data: null,
          changes: [change("ACK", 0, 0x88)],
        }),
      },
      {},
      102,
      /^ACK sent DF \(0x00\), arrived AF41 \(0x88\): rewritten/,
    ],
    [
      "a marked ACK changed",
      {
        markSyn: true,
        arrived: arrivedWith({ ack: 0, data: null, changes: [change("ACK", 0xb8, 0)] }),
      },
      {},
      102,
      /^ACK sent EF \(0xB8\), arrived DF/,
    ],
    [
      "SYN changed, request unknown",
      { arrived: arrivedWith({ syn: 0x20, data: null, changes: [change("SYN", 0, 0x20)] }) },
      {},
      102,
      /^SYN sent DF \(0x00\), arrived CS1 \(0x20\): rewritten by this host or the path$/,
    ],
    [
      "not as expected",
      { arrived: arrivedWith({ changes: [change("data", 0xb8, 0xb8, 0x88)] }) },
      {},
      102,
      /^sent EF \(0xB8\), arrived EF \(0xB8\), expected AF41 \(0x88\)$/,
    ],
    [
      "came back changed",
      { returned: { sent: 0xb8, arrived: 0, kept: false } },
      {},
      102,
      /^the reply was sent EF .* came back DF/,
    ],
    ["came back unknown", { returned: { sent: 0xb8, arrived: null, kept: null } }, {}, 0, null],
    ["another failure", { failure: timeout }, {}, 28, /^the request took/],
    [
      "dropped",
      { failure: timeout, sent: repeated },
      {},
      28,
      /EF \(0xB8\) got no answer, and 3 packets of it were sent again$/,
      /-d EF,DF/,
    ],
    [
      "a marked SYN dropped",
      { failure: timeout, sent: NOT_OBSERVED, markSyn: true },
      {},
      28,
      /second$/,
      /-d EF,DF/,
    ],
    [
      "no answer, of a name",
      { target: parseTarget("http://h/"), failure: timeout, sent: NOT_OBSERVED, markSyn: true },
      {},
      28,
      /second$/,
      /^$/,
    ],
    [
      "no answer to an unmarked SYN",
      { failure: timeout, sent: NOT_OBSERVED },
      {},
      28,
      /second$/,
      /^$/,
    ],
    [
      "no answer to a SYN with DF",
      { failure: timeout, sent: NOT_OBSERVED, markSyn: true, mark: DF },
      {},
      28,
      /second$/,
      /^$/,
    ],
    [
      "dropped, but the SYN was marked too",
      { failure: timeout, sent: repeated, markSyn: true },
      {},
      28,
      /second$/,
    ],
    ["dropped, but unmarked", { failure: timeout, sent: repeated, mark: DF }, {}, 28, /second$/],
    [
      "slow, with a reply",
      { failure: timeout, sent: repeated, reply: OUR_REPLY },
      {},
      28,
      /second$/,
    ],
    [
      "reset again and again",
      { failure: new Failure(56, "reset"), sent: repeated },
      {},
      56,
      /^reset$/,
    ],
    [
      "changed and failed",
      { failure: timeout, sent: { ...SENT, proved: false, wrong: 0x20 } },
      {},
      101,
      /rewrote it; the request took longer/,
    ],
    [
      "changed, and nobody to print for",
      {
        failure: new Failure(Exit.cannotWrite, ""),
        sent: { ...SENT, proved: false, wrong: 0x20 },
      },
      {},
      23,
      null,
    ],
    [
      "changed and interrupted",
      {
        failure: new Failure(130, "interrupted"),
        sent: { ...SENT, proved: false, wrong: 0x20 },
      },
      {},
      130,
      /^interrupted$/,
    ],
    [
      "https behind http",
      { target: parseTarget("http://h:8443/"), failure: new Failure(52, "empty") },
      {},
      52,
      /empty/,
      /https/,
    ],
    [
      "reset behind http",
      { target: parseTarget("http://h:443/"), failure: new Failure(56, "lost") },
      {},
      56,
      /lost/,
      /https/,
    ],
    [
      "no https port",
      { target: parseTarget("http://h:8080/"), failure: new Failure(52, "empty") },
      {},
      52,
      /empty/,
      undefined,
    ],
    ["unproved, not required", { sent: NOT_OBSERVED }, {}, 0, null],
    ["unproved", { sent: NOT_OBSERVED }, proof, 104, /no packet was observed/],
    [
      "partly proved",
      { sent: { ...SENT, proved: null, bytes: { seen: 5, sent: 9 } } },
      proof,
      104,
      /only 5 of 9 bytes/,
    ],
    [
      "unknown size",
      { sent: { ...SENT, proved: null, bytes: { seen: 5, sent: null } } },
      proof,
      104,
      /only 5 of \? bytes/,
    ],
    [
      "taken",
      { sent: { ...SENT, proved: null, takenBy: "a tunnel device" } },
      proof,
      104,
      /a tunnel device$/,
    ],
    ["a server that is not ours", { reply: replyWith({ server: "nginx" }) }, proof, 0, null],
    [
      "our server reports nothing",
      { reply: OUR_REPLY },
      proof,
      104,
      /does not report what arrived/,
    ],
    [
      "our server behind a proxy",
      { reply: OUR_REPLY, arrived: arrivedWith({ isOther: true }) },
      proof,
      104,
      /a proxy/,
    ],
    [
      "the handshake only",
      { reply: OUR_REPLY, arrived: arrivedWith({ data: null }) },
      proof,
      104,
      /with which mark the request/,
    ],
    ["all reported", { reply: OUR_REPLY, arrived: ARRIVED }, proof, 0, null],
    [
      "one packet of several",
      { reply: OUR_REPLY, arrived: ARRIVED, sent: { ...SENT, packets: Array(10).fill(packet()) } },
      proof,
      104,
      /for 1 of 10 packets/,
    ],
  ];
  for (const [what, more, options, code, words, hint] of cases) {
    const failure = requestFailure(exchange(more), { requireProof: false, ...options });
    assert.equal(failure?.code ?? 0, code, what);
    if (words !== null) assert.match(failure!.message, words, what);
    if (hint !== undefined) assert.match(failure!.hint ?? "", hint, what);
  }
  const plain = requestFailure(
    exchange({ target: parseTarget("http://h:8080/"), failure: new Failure(52, "empty") }),
    { requireProof: false },
  );
  assert.equal(plain!.hint, undefined);
  const both = requestFailure(
    exchange({ failure: timeout, sent: { ...SENT, proved: false, wrong: 0x20 } }),
    { requireProof: false },
  );
  assert.equal(both!.cause, timeout);
});

Deno.test("a run ends with its first failure, but a wrong mark comes before others", () => {
  const [other, left, arrived] = [28, 101, 102].map((code) => new Failure(code, "x"));
  assert.equal(moreSevere(null, null), null);
  assert.equal(moreSevere(null, other), other);
  assert.equal(moreSevere(other, null), other);
  assert.equal(moreSevere(other, arrived), arrived);
  assert.equal(moreSevere(left, arrived), left);
  assert.equal(moreSevere(arrived, left), arrived);
  assert.equal(moreSevere(left, other), left);
  assert.deepEqual([other, left, arrived, null].map(isWrongMark), [false, true, true, false]);
});

Deno.test("a server is ours by its Server header", () => {
  assert.equal(isOurs(OUR_REPLY), true);
  assert.equal(isOurs(replyWith({ server: "nginx dscp-get/1" })), false);
  assert.equal(isOurs(replyWith({ via: "dscp-get/0.3.0" })), false);
  assert.equal(isOurs(null), false);
});
