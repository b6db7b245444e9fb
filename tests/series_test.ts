import assert from "node:assert/strict";
import { keepArrivals, type Mark, markOf, readArrived } from "../ffi/mod.ts";
import type { Arrival, Exchange, Requester } from "../src/exchange.ts";
import { Exit, Failure } from "../src/failure.ts";
import { parseArguments } from "../src/options.ts";
import {
  bar,
  comparisonText,
  Row,
  series,
  seriesFailure,
  summaryJson,
  table,
} from "../src/series.ts";
import { remoteServer, type Server } from "../src/server.ts";
import { shuffled } from "../src/statistics.ts";
import { localTarget } from "../src/target.ts";
import { NOT_OBSERVED } from "../src/verdict.ts";
import { until } from "./support/waiting.ts";
import { Random } from "./support/random.ts";
import { Namespace, rewrite } from "./support/namespaces.ts";
import {
  Background,
  command,
  dscpGet,
  execute,
  onTerminal,
  openDescriptors,
  succeed,
  testWith,
  waitsForReader,
} from "./support/processes.ts";
import {
  closedPort,
  FarEnd,
  OK,
  RawServer,
  readRequest,
  replying,
  reset,
  send,
} from "./support/servers.ts";

Deno.test("each round has every mark once, in random order, and JSON has a line a request", async () => {
  await using server = replying(OK);
  const args = ["--json", "-d", "EF,af41,0", "-n", "20", server.url];
  const { code, stdout, stderr } = await dscpGet(args);
  assert.deepEqual([code, stderr], [0, ""]);
  const lines = stdout.trim().split("\n").map((line) => JSON.parse(line)).slice(0, -1);
  assert.deepEqual(
    lines.map(({ round }) => round),
    Array.from({ length: 60 }, (_, at) => 1 + Math.floor(at / 3)),
  );
  const bytes: Record<string, number> = { EF: 0xb8, AF41: 0x88, DF: 0 }, orders = new Set<string>();
  for (let at = 0; at < lines.length; at += 3) {
    const round = lines.slice(at, at + 3);
    for (const { mark, sent } of round) assert.equal(sent.packets[0].tos, bytes[mark.name]);
    orders.add(round.map(({ mark }) => mark.name).join());
    assert.equal(new Set(round.map(({ mark }) => mark.name)).size, 3);
  }
  assert.ok(orders.size > 1, "the same order 20 times has a chance of one in 10 ** 14");
  assert.equal(server.requests.length, 61, "one more, which is not measured");
});

Deno.test("a series tells what a server did wrong in the words of a single request", async () => {
  const half = "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhe";
  for (
    const [code, doing] of [
      [8, "SSH-2.0\r\n"],
      [18, half],
      [52, "HTTP/1.1 2"],
      [52, ""],
      [56, null],
    ] as const
  ) {
    await using server = new RawServer(async (conn) => {
      await readRequest(conn);
      if (doing === null) reset(conn);
      else if (doing !== "") await send(conn, doing);
    });
    const [once, twice] = [
      await dscpGet(["-s", server.url]),
      await dscpGet(["-s", "-n", "2", server.url]),
    ];
    assert.equal(once.code, code, once.stderr);
    assert.equal(twice.code, code, twice.stderr);
    const words = once.stderr.replace(
      "dscp-get: ",
      "dscp-get: 2 of 2 requests failed; the first: ",
    );
    assert.equal(twice.stderr, words);
  }
});

Deno.test("-d all is the 64 code points", async () => {
  await using server = replying(OK);
  const { stdout } = await dscpGet(["--json", "-d", "all", server.url]);
  const lines = stdout.trim().split("\n").map((line) => JSON.parse(line));
  assert.deepEqual(
    lines.slice(0, -1).map(({ sent }) => sent.packets[0].tos).sort((a, b) => a - b),
    Array.from({ length: 64 }, (_, dscp) => dscp * 4),
  );
});

Deno.test("piped, one table comes at the end, a row a mark, and no body", async () => {
  await using server = replying(OK);
  const { code, stdout, stderr } = await dscpGet(["-d", "EF,DF", "-n", "9", server.url]);
  assert.deepEqual([code, stderr], [0, ""]);
  const [titles, head, ef, df, sentence, ...rest] = stdout.split("\n");
  assert.match(titles, /^ +wrong connect ms total ms +bar:$/);
  assert.match(
    head,
    /^mark +sent +arrived +requests +failed +mark +median +median +p95 +max +\(median\)$/,
  );
  assert.match(ef, /^EF +0xB8 +- +9 +0 +0( +[\d.]+){4} +[█▏▎▍▌▋▊▉]+$/);
  assert.match(df, /^DF +0x00 +- +9 +0 +0( +[\d.]+){4} +[█▏▎▍▌▋▊▉]+$/);
  assert.match(
    sentence,
    /^Against DF, median total time: (no difference seen for EF|EF is [\d.]+ times (faster|slower)) \(p = \S+\)\.$/,
  );
  assert.deepEqual(rest, [""]);
  assert.match(
    (await dscpGet(["-d", "EF,DF", "-n", "2", server.url])).stdout.replaceAll("\n", " "),
    /with fewer than 8 replies to a mark no difference can be seen/,
  );
  const silent = await dscpGet(["-s", "-n", "2", server.url]);
  assert.deepEqual([silent.stdout, silent.stderr], ["", ""]);
});

Deno.test("a failed request is counted in its row, the run goes on, and the exit code is the first failure's", async () => {
  // The first request is not measured.
  let served = 2;
  await using server = new RawServer(async (conn) => {
    await readRequest(conn);
    await send(conn, ["", "nonsense\r\n", OK][Math.min(served++ % 4, 2)]);
  });
  const { code, stdout, stderr } = await dscpGet(["-n", "8", server.url]);
  assert.equal(code, 52);
  assert.match(stdout, /^EF +0xB8 +- +8 +4 +0 /m);
  assert.match(stderr, /^dscp-get: 4 of 8 requests failed; the first: empty reply/m);
  const json = await dscpGet(["--json", "-n", "2", server.url]);
  const codes = json.stdout.trim().split("\n").map((line) => JSON.parse(line).error?.code);
  assert.deepEqual(codes, [52, 8, undefined], "the last line is the summary");
});

Deno.test("a wrong mark is the exit code also if another request has failed before", async () => {
  const arrived = (conn: Deno.TcpConn) => {
    const { hostname, port } = conn.remoteAddr;
    return OK.replace("\r\n", `\r\nArrived-SYN: 0x20\r\nArrived-Peer: ${hostname}:${port}\r\n`);
  };
  for (
    const [args, message] of [
      [
        ["-n", "3"],
        "1 of 3 requests failed, 2 of 3 requests with a wrong mark; first wrong mark: ",
      ],
      [["--trace", "-d", "EF,AF41,AF42"], "3 of 3 marks changed or failed; the first change: "],
    ] as const
  ) {
    // The first request of a series is not measured.
    let served = args[0] === "-n" ? -1 : 0;
    await using server = new RawServer(async (conn) => {
      await readRequest(conn);
      if (served++ !== 0) await send(conn, arrived(conn));
    });
    const { code, stderr } = await dscpGet(["--mark-syn", ...args, server.url]);
    assert.equal(code, 102, stderr);
    assert.ok(stderr.includes(`dscp-get: ${message}`), stderr);
  }
});

Deno.test("ten thousand requests in one process leave descriptors and memory as they were", async () => {
  const seen: { descriptors: number; memory: number }[] = [];
  let run: Background | null = null, served = 0;
  await using server = new RawServer(async (conn) => {
    await readRequest(conn);
    if (++served === 100 || served === 9900) {
      // What is its own: pages of Deno's file come and go, and every process that runs Deno shares them.
      const memory =
        /RssAnon:\s+(\d+)/.exec(Deno.readTextFileSync(`/proc/${run!.child.pid}/status`))![1];
      seen.push({
        descriptors: openDescriptors(run!.child.pid),
        memory: Number(memory) / 1024,
      });
    }
    await send(conn, OK);
  });
  run = new Background(command(["-s", "-n", "10000", server.url]));
  const { code } = await run.end();
  assert.deepEqual([code, served, run.said], [0, 10001, ""]);
  const [early, late] = seen;
  assert.equal(late.descriptors, early.descriptors);
  // Compiled code, and room for garbage, of which a bare loop has 4 MiB; more where there are more processors.
  assert.ok(late.memory - early.memory < 16, `${late.memory - early.memory} MiB more`);
});

/** A server that acts by the mark of each SYN, for `--mark-syn`. */
function serverByMark(act: (tos: number, conn: Deno.TcpConn) => Promise<void>): RawServer {
  const server = new RawServer(async (conn) => {
    const { syn } = readArrived(conn);
    await readRequest(conn);
    await act(syn!, conn);
  });
  keepArrivals(server.listener);
  return server;
}

const pause = (milliseconds: number) => new Promise((go) => setTimeout(go, milliseconds));

Deno.test("a difference that is real is told in one sentence, with its ratio and the test's p-value", async () => {
  await using server = serverByMark(async (tos, conn) => {
    if (tos === 0xb8) await pause(20);
    await send(conn, OK);
  });
  const { code, stdout } = await dscpGet(["--mark-syn", "-d", "DF,EF", "-n", "40", server.url]);
  assert.equal(code, 0);
  assert.match(
    stdout,
    /^Against DF, median total time: EF is [\d.]+ times slower \(p = \d\.\de-\d+\)\.$/m,
  );
});

Deno.test("a server that alternates between a fast and a slow way makes no difference of marks", async () => {
  let served = 0, claims = 0;
  await using server = new RawServer(async (conn) => {
    await readRequest(conn);
    if (++served % 2 === 0) await pause(10);
    await send(conn, OK);
  });
  for (let run = 0; run < 3; run++) {
    const { stdout } = await dscpGet(["-d", "EF,DF", "-n", "40", server.url]);
    if (!stdout.includes("no difference seen for EF")) claims++;
  }
  // In a fixed order it is three; of random orders one in a hundred looks like a difference.
  assert.ok(claims <= 1, `${claims} of 3 runs claim a difference`);
});

Deno.test("slow replies with one mark are a difference also if the medians are alike", async () => {
  let served = 0;
  await using server = serverByMark(async (tos, conn) => {
    // So slow that what else the machine does counts for little.
    await pause(tos === 0xb8 && ++served % 5 < 2 ? 120 : 15);
    await send(conn, OK);
  });
  const { stdout } = await dscpGet(["--mark-syn", "-d", "EF,DF", "-n", "25", server.url]);
  const text = stdout.replaceAll("\n", " ");
  assert.match(
    text,
    /1\d of 25 replies with EF took over [\d.]+ ms, 3 times the median, \d of 25 with DF \(p = \S+\)\./,
  );
  assert.doesNotMatch(text, /no difference seen/);
});

Deno.test("failures of one mark are a difference, and a request that arrived was not dropped", async () => {
  let served = 0;
  await using server = serverByMark(async (tos, conn) => {
    if (tos === 0xb8 && ++served % 5 < 3) await conn.read(new Uint8Array(1));
    else await send(conn, OK);
  });
  const args = ["--mark-syn", "-d", "EF,DF", "-n", "20", "-m", "0.3", server.url];
  const { code, stdout } = await dscpGet(args);
  assert.equal(code, 28);
  const text = stdout.replaceAll("\n", " ");
  assert.match(text, /12 of 20 requests with EF failed, 0 of 20 with DF \(p = 4\.5e-5\)\. /);
  assert.doesNotMatch(text, /no difference|drops|polices/);
});

for (
  const [name, hook, args, words] of [
    ["data is dropped", "input", [], "the path drops EF"],
    ["the SYN is dropped", "input", ["--mark-syn"], "the path drops EF"],
    ["this host drops", "output", [], "this host or the path drops EF"],
  ] as const
) {
  testWith(["root", "ip", "nft"], `a mark that gets no answer is dropped: ${name}`, async () => {
    await using namespace = await Namespace.create();
    await using _server = await FarEnd.start("8086", namespace.under);
    const rules = [
      "add table inet t",
      `add chain inet t c { type filter hook ${hook} priority 0; }`,
      `add rule inet t c ip dscp ef tcp dport 8086 drop`,
    ];
    await succeed(...namespace.under, "nft", rules.join("; "));
    const few = ["-d", "EF,DF", "-m", "0.3", ...args, "http://127.0.0.1:8086/"];
    const { code, stdout } = await dscpGet(["-n", "9", ...few], namespace);
    assert.equal(code, 28);
    const text = stdout.replaceAll("\n", " ");
    assert.ok(
      text.includes(`EF: 0 of 9 answered, DF: 9 of 9 (p = 4.1e-5): ${words}, or delays`),
      text,
    );
    assert.doesNotMatch(text, /no difference/);
  });
}

Deno.test("-m bounds each request", async () => {
  let served = 0;
  await using server = new RawServer(async (conn) => {
    await readRequest(conn);
    if (served++ % 2 === 0) await send(conn, OK);
    else await conn.read(new Uint8Array(1));
  });
  const { code, stdout } = await dscpGet(["-n", "4", "-m", "1", server.url]);
  assert.equal(code, 28);
  assert.match(stdout, /^EF .* 4 +2 +0 /m);
});

testWith(
  ["root", "ip", "nft"],
  "a mark that is rewritten on this host shows in its row only, and is 101",
  async () => {
    await using namespace = await Namespace.create();
    await rewrite(namespace, "output", "af41", "cs1");
    const { code, stdout, stderr } = await dscpGet(["-d", "EF,AF41", "-n", "2"], namespace);
    assert.equal(code, 101);
    assert.match(stdout, /^EF +0xB8 +0xB8 +2 +0 +0 /m);
    assert.match(
      stdout,
      /^AF41 +0x20 ! +0x20 ! +2 +0 +2 /m,
      "a wrong mark is not a failed request",
    );
    assert.match(stderr, /^dscp-get: 2 of 4 requests with a wrong mark; the first: set 0x88/m);
  },
);

Deno.test("Ctrl-C prints the table of what was done so far: 130", async () => {
  let served = 0;
  const third = Promise.withResolvers<void>();
  await using server = new RawServer(async (conn) => {
    await readRequest(conn);
    // The first is not measured.
    if (++served < 3) return await send(conn, OK);
    third.resolve();
    await conn.read(new Uint8Array(1));
  });
  await using run = new Background(command(["-n", "100", server.url]));
  await third.promise;
  const { code } = await run.stop("SIGINT");
  assert.equal(code, 130);
  assert.match(run.said, /^mark [^]*^EF +0xB8 +- +1 +0 +0 /m);
  assert.match(run.said, /^dscp-get: interrupted after 1 of 100 requests$/m);
});

testWith(["script"], "on a terminal the table grows, with a line for what is left", async () => {
  await using server = replying(OK);
  const words = command(["-d", "EF,DF", "-n", "300", server.url]).join(" ");
  const { stdout } = await execute(onTerminal(`stty rows 24; ${words}`));
  assert.match(stdout, /\d+ of 600 requests, Ctrl-C to stop/);
  assert.ok(stdout.includes("\x1b[A\x1b[2K"), "it goes up and clears");
  const last = stdout.slice(stdout.lastIndexOf("\x1b[2K"));
  assert.match(last, /EF .* 300 +0 +0 [^]*Against DF/);
  assert.doesNotMatch(last, /Ctrl-C/);
});

Deno.test("--interval waits between requests", async () => {
  const times: number[] = [];
  await using server = new RawServer(async (conn) => {
    times.push(performance.now());
    await readRequest(conn);
    await send(conn, OK);
  });
  assert.equal((await dscpGet(["-s", "-n", "3", "--interval", "0.2", server.url])).code, 0);
  // The one thing about time that holds on any machine: a wait is not shorter than asked for.
  assert.ok(times[1] - times[0] >= 195 && times[2] - times[1] >= 195, times.join());
});

Deno.test("bad counts, intervals and lists are usage errors", async () => {
  const bad = ["-n 0", "-n -1", "-n 1.5", "-n x", "-n 1000001", "--interval x"];
  for (const words of [...bad, "-d EF,", "-d EF,64", "-d all,64"]) {
    const args = words.split(" ");
    assert.equal((await dscpGet(args)).code, 2, args.join(" "));
  }
});

/** A row of made-up times around a median, spread by 1 %, in random order. */
function rowOf(tos: number, median: number, count = 5000): Row {
  const row = new Row(markOf(tos)), random = new Random(tos);
  const times = Array.from({ length: count }, (_, at) => 0.995 + 0.01 * at / (count - 1));
  row.total.push(...shuffled(times, () => random.below(1e6) / 1e6).map((time) => median * time));
  row.failures.push(...row.total.map(() => false));
  row.requests = row.answered = count;
  return row;
}

/** Adds requests to a row that failed, because they were lost or for another reason. */
function failing(row: Row, count: number, isLost = true): Row {
  for (let at = 0; at < count; at++) {
    row.total[at] = NaN;
    row.failures[at] = true;
  }
  row.requests = row.total.length;
  row.failed = count;
  row.answered = row.requests - count;
  row.lost = isLost ? count : 0;
  return row;
}

/** A row of which so many replies, spread evenly, took ten times the median of 1 ms. */
function slowed(tos: number, slow: number, count: number): Row {
  const row = rowOf(tos, 1, count);
  for (let at = 0; at < slow; at++) row.total[Math.floor(at * count / slow)] = 10;
  return row;
}

Deno.test("slow replies and failures have a sentence of their own", () => {
  const slow = (count: number, of: number) => [slowed(0xb8, count, of), rowOf(0, 1, of)];
  const failed = (count: number, of: number, isLost = true) => [
    failing(rowOf(0xb8, 1, of), count, isLost),
    rowOf(0, 1, of),
  ];
  const cases: [Row[], RegExp][] = [
    [
      slow(16, 40),
      /^16 of 40 replies with EF took over 3\.0 ms, 3 times the median, 0 of 40 with DF \(p = 4\.7e-6\)\.\n$/,
    ],
    [
      slow(16, 40).reverse().map((row, at) => Object.assign(row, { mark: markOf(at ? 0 : 0xb8) })),
      /^0 of 40 replies with EF took over .*, 16 of 40 with DF \(p = 4\.7e-6\)\.\n$/,
    ],
    [
      [slowed(0xb8, 40, 40), rowOf(0, 1, 40)],
      /^Against DF, .*: EF is 10 times slower \(p = \S+\)\.\n$/,
    ],
    [
      [slowed(0xb8, 24, 40), rowOf(0, 1, 40)],
      /^Against DF, .*: EF is 10 times slower \(p = \S+\)\.\n$/,
    ],
    [slow(99, 5000), /^Against DF, .*: no difference seen that matters for EF\.\n$/],
    [slow(101, 5000), /^101 of 5000 replies with EF took over/],
    [
      failed(24, 40),
      /^24 of 40 requests with EF failed, 0 of 40 with DF \(p = 7\.7e-10\): the path drops or polices EF, or delays it past the time limit\.\n$/,
    ],
    [
      failed(24, 40, false),
      /^24 of 40 requests with EF failed, 0 of 40 with DF \(p = 7\.7e-10\)\.\n$/,
    ],
    [
      [rowOf(0xb8, 1, 40), failing(rowOf(0, 1, 40), 24)],
      /^24 of 40 requests with DF failed, 0 of 40 with EF .*: the path drops or polices DF/,
    ],
    [
      failed(40, 40),
      /^EF: 0 of 40 answered, DF: 40 of 40 \(p = \S+\): the path drops EF, or delays it past the time limit\.\n$/,
    ],
    [failed(40, 40, false), /^40 of 40 requests with EF failed, 0 of 40 with DF \(p = \S+\)\.\n$/],
    [
      failed(3, 3),
      /^EF: 0 of 3 answered, DF: 3 of 3 \(p = 0\.10\): too few requests to tell this from chance\.\nAgainst DF, .* no difference can be seen\.\n$/,
    ],
    [
      failed(2, 3),
      /^Against DF, median total time: with fewer than 8 replies to a mark no difference can be seen\.\n$/,
    ],
    [[failing(rowOf(0xb8, 1, 3), 3), failing(rowOf(0, 1, 3), 3)], /^Against DF, [^:]*: with fewer/],
    [[failing(rowOf(0xb8, 1, 3), 3), failing(rowOf(0, 1, 3), 1)], /^Against DF, [^:]*: with fewer/],
    [[failing(rowOf(0xb8, 1, 3), 3), new Row(markOf(0))], /^Against DF, [^:]*: with fewer/],
    [[new Row(markOf(0xb8)), failing(rowOf(0, 1, 3), 3)], /^Against DF, [^:]*: with fewer/],
    [[new Row(markOf(0xb8)), new Row(markOf(0))], /^Against DF, [^:]*: with fewer/],
    [[rowOf(0xb8, 1, 3), new Row(markOf(0))], /^Against DF, [^:]*: with fewer/],
    [failed(49, 5000), /^Against DF, .*: no difference seen that matters for EF\.\n$/],
    [failed(51, 5000), /^51 of 5000 requests with EF failed/],
  ];
  for (const [rows, text] of cases) assert.match(comparisonText(rows, 500), text);
  const rows = failed(40, 40);
  rows[0].lostUnseen = 1;
  assert.match(comparisonText(rows, 500), /: this host or the path drops EF,/);
});

Deno.test('a p-value in "no difference seen" is never one that would be a difference', () => {
  const random = new Random(7);
  for (let trial = 0; trial < 300; trial++) {
    const count = 8 + random.below(60), shift = random.below(20) / 100;
    const rows = [0xb8, 0].map((tos) => {
      const row = rowOf(tos, 1, count);
      row.total.forEach((_, at) =>
        row.total[at] = (1 + random.below(100) / 100) * (tos ? 1 + shift : 1)
      );
      return failing(row, random.below(3));
    });
    const p = /no difference seen for EF \(p = (\S+)\)/.exec(comparisonText(rows, 500))?.[1];
    if (p !== undefined) assert.ok(Number(p) >= 0.0033, p);
  }
});

Deno.test("of many marks a summary says how many pass, and few are told of one by one", () => {
  const marks = Array.from({ length: 64 }, (_, dscp) => {
    const row = failing(rowOf(dscp << 2, 1, 1), dscp < 7 ? 0 : 1);
    if (dscp < 7) row.arrived.add(dscp < 5 ? dscp << 2 : 0);
    if (dscp < 5) row.kept = 1;
    else if (dscp < 7) row.wrong = 1;
    return row;
  });
  const summary = (rows: Row[]) => comparisonText(rows, 500).trimEnd().split("\n").at(-1);
  assert.equal(
    summary(marks),
    "5 of 64 marks pass unchanged: DF, LE, 2, 3, 4; 2 are changed; 57 get no answer.",
  );
  assert.equal(
    summary(marks.slice(0, 5).concat(marks.slice(0, 4))),
    "9 of 9 marks pass unchanged.",
  );
  assert.equal(summary(marks.slice(5, 14)), "2 of 9 marks are changed; 7 get no answer.");
  assert.doesNotMatch(comparisonText(marks.slice(0, 8), 500), / pass /, "eight are few");
  const remapped = marks.slice(0, 9);
  remapped[5].kept = 1;
  remapped[5].wrong = 0;
  assert.match(
    summary(remapped)!,
    /^5 of 9 .*; 2 are changed; 2 get no answer\.$/,
    "expected, not unchanged",
  );
  marks[8].wrong = 1;
  assert.match(
    summary(marks)!,
    /; 3 are changed; 56 get no answer\.$/,
    "no answer, but seen to leave changed",
  );
  const unexpected = marks.slice(0, 9);
  unexpected[0].wrong = 1;
  assert.match(summary(unexpected)!, /; 1 pass, but are not as they should be; /);
  unexpected[0].wrong = 0;
  const unknown = Array.from({ length: 9 }, (_, at) => rowOf(at << 2, 1, 2));
  const report = "without a report of what arrived";
  assert.equal(summary(unknown), `9 of 9 marks are answered ${report}.`);
  unknown[0].kept = 1;
  assert.doesNotMatch(summary(unknown)!, /pass/, "one of two requests is not known");
  unknown[1].answered = unknown[1].kept = 1;
  const inPart = `1 of 9 marks are answered in part; 8 are answered ${report}.`;
  assert.equal(summary(unknown), inPart);
  const interrupted = [...marks.slice(0, 5), ...marks.slice(0, 4).map(({ mark }) => new Row(mark))];
  assert.match(summary(interrupted)!, /^5 of 9 marks pass unchanged: .*; 4 were not tried\.$/);
  const lost = Array.from(
    { length: 9 },
    (_, at) => failing(rowOf(at << 2, 1, 40), at === 0 ? 0 : 40),
  );
  const said = comparisonText(lost, 500);
  assert.equal(said.match(/the path drops/g)!.length, 4);
  assert.match(said, /^The same can be said of 4 more marks\.$/m);
  const four = comparisonText(lost.slice(0, 5), 500);
  assert.equal(four.match(/the path drops/g)!.length, 4);
  assert.doesNotMatch(four, /The same/);
});

Deno.test("the comparison is a sentence", () => {
  const best = rowOf(0, 1);
  for (
    const [rows, text] of [
      [[best], /^$/],
      [
        [rowOf(0xb8, 1), best],
        /^Against DF, median total time: no difference seen for EF \(p = 1\.0\)\.\n$/,
      ],
      [[rowOf(0xb8, 1.2), best], /^Against DF, .*: EF is 1\.20 times slower \(p = \S+\)\.\n$/],
      [[rowOf(0xb8, 0.05), best], /: EF is 20 times faster \(p = \S+\)\.\n$/],
      [[rowOf(0xb8, 0.101), best], /: EF is 9\.90 times faster \(p = \S+\)\.\n$/],
      [[rowOf(0xb8, 1), rowOf(0x88, 1.5)], /^Against EF, .* AF41 is 1\.50 times slower/],
      [
        [rowOf(0xb8, 1.2), rowOf(0x88, 1), rowOf(0x28, 0.5), best],
        /: EF is 1\.20 times slower \(p = \S+\), AF11 is 2\.00 times faster \(p = \S+\), no difference seen for AF41 \(p = \S+\)\.\n$/,
      ],
      [
        [rowOf(0xb8, 1), rowOf(0x88, 1.5), rowOf(0x28, 1, 7), best],
        /: AF41 is 1\.50 times slower \(p = \S+\), no difference seen for EF \(p = \S+\), too few replies, under 8, for AF11\.\n$/,
      ],
      [[rowOf(0xb8, 1), rowOf(0x88, 1), best], / no difference seen for EF, AF41 \(p ≥ \S+\)\.\n$/],
      [[1, 2, 3, 4, 5].map((at) => rowOf(at * 32, 1)).concat(best), / seen for 5 others \(p ≥/],
      [
        [1, 2, 3, 4].map((at) => rowOf(at * 32, 1)).concat(best),
        / seen for CS1, CS2, CS3, CS4 \(p/,
      ],
      [
        [rowOf(0xb8, 2, 7), best],
        /^Against DF, .*: with fewer than 8 replies to a mark no difference can be seen\.\n$/,
      ],
    ] as const
  ) assert.match(comparisonText(rows, 500), text);
  const narrow = comparisonText([rowOf(0xb8, 1), best], 30).trimEnd().split("\n");
  assert.ok(narrow.length > 1 && narrow.every((line) => line.length <= 30));
});

Deno.test("the summary in JSON has the times, counts and comparisons of each mark", () => {
  const rows = [failing(rowOf(0xb8, 1, 40), 10), rowOf(0, 1, 40)];
  rows[0].total.splice(10, 30, ...Array.from({ length: 30 }, (_, at) => at + 1));
  rows[0].connect.push(NaN, 5, 1, 4, 2, 3);
  rows[0].sent.add(0xb8);
  rows[0].arrived.add(0x20);
  rows[0].changed.add("SYN 0x20");
  rows[0].wrong = 1;
  const { summary } = JSON.parse(summaryJson(rows));
  const { compared, ...ef } = summary[0];
  assert.deepEqual(ef, {
    mark: { ...markOf(0xb8) },
    requests: 40,
    failed: 10,
    wrong: 1,
    sent: [0xb8],
    arrived: [0x20],
    changed: ["SYN 0x20"],
    milliseconds: { connect: { median: 3 }, total: { median: 15, p95: 29, max: 30 } },
  });
  const { against, failed, slow, differs } = compared;
  assert.deepEqual([against, differs], ["DF", true]);
  assert.deepEqual(failed, {
    count: 10,
    of: 40,
    against: { count: 0, of: 40 },
    p: 0.00102966,
    differs: true,
  });
  assert.deepEqual([slow.of, slow.against], [30, { count: 0, of: 40 }]);
  assert.equal(summary[1].compared, null);
  const empty = JSON.parse(summaryJson([new Row(markOf(0xb8)), new Row(markOf(0))])).summary[0];
  assert.equal(empty.milliseconds.connect.median, null, "unknown is null");
});

Deno.test("a bar is drawn to an eighth of a character", () => {
  for (
    const [share, width, expected] of [
      [0, 8, ""],
      [1, 8, "████████"],
      [0.5, 8, "████"],
      [0.5, 1, "▌"],
      [1 / 8, 1, "▏"],
      [7 / 8, 1, "▉"],
      [1 / 17, 1, ""],
      [1 / 15, 1, "▏"],
      [0.26, 8, "██▏"],
    ] as const
  ) assert.equal(bar(share, width), expected);
});

testWith(
  ["root", "ip", "socat"],
  "with a proxy in between nothing is said to have arrived: its packets are not ours",
  async () => {
    await using namespace = await Namespace.create();
    await using _server = await FarEnd.start("8087", namespace.under);
    await using proxy = new Background([
      ...namespace.under,
      ..."socat -d -d TCP4-LISTEN:8088,fork,reuseaddr TCP4:127.0.0.1:8087".split(" "),
    ]);
    await proxy.until((said) => said.includes("listening on"));
    const args = ["--mark-syn", "-n", "2"];
    const { code, stdout, stderr } = await dscpGet([...args, "http://127.0.0.1:8088/"], namespace);
    assert.equal(code, 0, stderr);
    assert.match(stdout, /^EF +0xB8 +- +2 +0 +0 /m);
  },
);

Deno.test("the table has a row a mark, its times, and bars of the medians", () => {
  const rows = [rowOf(0xb8, 1.25, 8), rowOf(0, 1, 8)];
  rows[0].sent.add(0x20);
  rows[0].isSentWrong = true;
  rows[0].wrong = 3;
  rows[1].sent.add(0);
  rows[1].arrived.add(0);
  rows[1].connect.push(0.5, 0.25);
  assert.deepEqual(table(rows, 80).trimEnd().split("\n"), [
    "                                    wrong connect ms total ms         bar:",
    "mark sent   arrived requests failed  mark     median   median p95 max (median)",
    "EF   0x20 ! -              8      0     3          -      1.2 1.3 1.3 ██████████",
    "DF   0x00   0x00           8      0     0       0.25     1.00 1.0 1.0 ████████",
  ]);
  rows[1].arrived.clear();
  rows[1].isArrivedWrong = true;
  rows[1].changed.add("SYN 0x20");
  assert.match(table(rows, 200), /^DF +0x00 +SYN 0x20 ! +8 .* 1\.0 █{19}▎$/m);
  assert.match(table(rows, 200), /^EF .* 1\.3 █{24}$/m);
});

Deno.test("with fewer than 8 replies a mark, or no room, there are no bars", () => {
  const columns = (rows: Row[], width: number) => table(rows, width).split("\n")[1];
  const both = [rowOf(0xb8, 1, 8), rowOf(0, 1, 8)];
  assert.match(columns(both, 80), / max \(median\)$/);
  assert.match(columns([both[0], rowOf(0, 1, 7)], 80), / max$/);
  assert.match(columns([failing(rowOf(0xb8, 1, 8), 1), both[1]], 80), / max$/);
  const bare = columns(both, 200).replace(/ \(median\)$/, "").length;
  assert.match(columns(both, bare + 9), / max \(median\)$/);
  assert.match(columns(both, bare + 8), / max$/);
});

Deno.test("on a narrow terminal whole columns of the table go, the times last, and no number is cut", () => {
  const rows = [rowOf(0xb8, 1.25), rowOf(0, 1)];
  for (const row of rows) {
    row.arrived.add(0x20).add(0xb8);
    row.sent.add(0xb8).add(0x20);
    row.changed.add("SYN 0x20");
    row.requests = 123;
  }
  const words = (text: string) => text.split("\n").slice(2).flatMap((line) => line.split(/ +/));
  const whole = new Set(words(table(rows, 200)));
  for (const width of [80, 70, 60, 56, 50, 46, 45, 40]) {
    const narrow = table(rows, width);
    assert.ok(narrow.split("\n").every((line) => line.length <= width), narrow);
    assert.deepEqual(words(narrow).filter((word) => !/█/.test(word) && !whole.has(word)), []);
  }
  const plain = [rowOf(0xb8, 1, 7), rowOf(0, 1, 7)];
  const all = "mark sent arrived requests failed mark median median p95 max".split(" ");
  for (
    const [width, names] of [
      [67, all],
      [66, all.filter((_, at) => at !== 6)],
      [56, all.filter((_, at) => at !== 6)],
      [55, "mark sent arrived failed mark median p95 max".split(" ")],
      [47, "mark sent arrived failed mark median p95 max".split(" ")],
      [46, "mark sent failed mark median p95 max".split(" ")],
      [39, "mark sent failed mark median p95 max".split(" ")],
      [38, "mark failed mark median p95 max".split(" ")],
      [34, "mark failed mark median p95 max".split(" ")],
      [33, "mark mark median p95 max".split(" ")],
      [27, "mark mark median p95 max".split(" ")],
      [26, "mark median p95 max".split(" ")],
      [21, "mark median p95 max".split(" ")],
      [20, "mark median p95".split(" ")],
      [17, "mark median p95".split(" ")],
      [16, "mark median".split(" ")],
    ] as const
  ) {
    const [, header] = table(plain, width).split("\n");
    assert.deepEqual(header.split(/ +/), names, `${width} columns`);
  }
  assert.ok(table(plain, 9).split("\n").every((line) => line.length <= 9));
});

Deno.test("without a reply the summary's p is not known, and the verdict names none", async () => {
  const port = closedPort();
  const url = `http://127.0.0.1:${port}/`;
  const { stdout } = await dscpGet(["--json", "-d", "EF,DF", "-n", "2", url]);
  const { summary } = JSON.parse(stdout.trim().split("\n").at(-1)!);
  assert.equal(summary[0].compared.p, null);
  assert.equal(JSON.parse(stdout.split("\n")[0]).mark.handshake, null);
  const text = (await dscpGet(["-d", "EF,DF", "-n", "2", url])).stdout;
  assert.match(text.replaceAll("\n", " "), /Against DF, .* no difference can be seen\. $/);
});

Deno.test("a series that is interrupted before its first reply says so", async () => {
  const asked = Promise.withResolvers<void>();
  await using server = new RawServer(async (conn) => {
    await readRequest(conn);
    asked.resolve();
    await conn.read(new Uint8Array(1));
  });
  await using run = new Background(command(["--json", "-n", "3", server.url]));
  await asked.promise;
  const { code } = await run.stop("SIGINT");
  assert.equal(code, 130);
  const line = JSON.parse(run.said.split("\n")[0]);
  assert.deepEqual([line.round, line.error.code, line.sent.proved], [1, 130, true]);
});

Deno.test("Ctrl-C ends a series also while nobody reads what it prints: 130", async () => {
  await using server = replying(OK);
  const [program, ...args] = command(["--json", "-n", "100000", server.url]);
  const child = new Deno.Command(program, { args, stdout: "piped", stderr: "null" }).spawn();
  await until(() => waitsForReader(child.pid), "a full pipe", 30);
  child.kill("SIGINT");
  assert.equal((await child.status).code, 130);
  await child.stdout.cancel();
});

// ─── The flow, with requests that are made up ────────────────────────────────────────────────────

const SERVER = remoteServer(localTarget("192.0.2.1", 80));

/** What became of a request that went well, or as is said. */
function exchangeOf(mark: Mark, rest: Partial<Exchange> = {}): Exchange {
  return {
    target: SERVER.target,
    mark,
    markSyn: false,
    expect: null,
    returned: { sent: null, arrived: null, kept: null },
    started: 0,
    connection: null,
    reply: {
      status: 200,
      reason: "OK",
      headers: [],
      trailers: [],
      tos: null,
      bodyBytes: 2,
      complete: true,
    },
    milliseconds: { connect: 1, firstByte: 2, total: 3 },
    sent: NOT_OBSERVED,
    arrived: null,
    failure: null,
    ...rest,
  };
}

const LOST = { reply: null, failure: new Failure(Exit.emptyReply, "empty reply") };
const WRONG = { failure: new Failure(Exit.sentChanged, "rewritten") };

/** Runs a series without output. @param outcome gets the number of the request; 0 is not measured */
async function seriesOf(
  words: string,
  outcome: (at: number, mark: Mark) => Partial<Exchange>,
  server = SERVER,
): Promise<{ failure: Failure | null; asked: string[] }> {
  const options = parseArguments(["-s", ...words.split(" ")]);
  const asked: string[] = [];
  const request: Requester = (target, mark) => {
    const isMeasured = target === server.target;
    asked.push(isMeasured ? mark.name! : target.isHttps ? "https" : "warm-up");
    assert.ok(isMeasured || mark === options.marks[0]);
    const at = asked.filter((name) => name !== "warm-up" && name !== "https").length - 1;
    return Promise.resolve(exchangeOf(mark, isMeasured ? outcome(at, mark) : {}));
  };
  const failure = await series(server, options, request);
  return { failure, asked };
}

Deno.test("a series first warms up at a server of its own", async () => {
  const warm = Array(16).fill("warm-up");
  const { asked } = await seriesOf("-d EF,DF -n 2", () => ({}));
  assert.deepEqual(asked.slice(0, 17), [...warm, "DF"], "and asks once for the baseline");
  assert.deepEqual(asked.slice(17).sort(), ["DF", "DF", "EF", "EF"]);
  const https = remoteServer({ ...SERVER.target, isHttps: true });
  const { asked: askedTls } = await seriesOf("-n 1 -d EF,DF", () => ({}), https);
  assert.deepEqual(askedTls.slice(0, 18), ["https", ...warm, "DF"]);
});

Deno.test("without permission for a server of its own a series does without the warm-up", async () => {
  await using server = replying(OK);
  const flags = [`--allow-net=127.0.0.1:${server.port}`, "--allow-ffi"];
  const { code, stderr } = await dscpGet(["-n", "2", server.url], { flags });
  assert.deepEqual([code, stderr], [0, ""]);
});

Deno.test("the first request, which is not measured, shows whether the server is there", async () => {
  const seen: unknown[] = [];
  const server: Server = {
    ...SERVER,
    throwIfGone({ mark, failure }, isSeries) {
      seen.push([mark.name, failure?.code, isSeries]);
      return Promise.resolve();
    },
  };
  const { failure } = await seriesOf("-d EF,DF -n 2", (at) => at === 0 ? LOST : {}, server);
  assert.equal(failure, null);
  assert.deepEqual(seen, [["DF", Exit.emptyReply, true]]);
});

Deno.test("the warm-up ends when it fails", async () => {
  let asked = 0;
  const request: Requester = (target, mark) => {
    if (target !== SERVER.target) asked++;
    return Promise.resolve(exchangeOf(mark, target === SERVER.target ? {} : LOST));
  };
  assert.equal(await series(SERVER, parseArguments(["-s", "-n", "2"]), request), null);
  assert.equal(asked, 1);
});

Deno.test("what would fail every request ends a series at once", async () => {
  const denied = new Failure(Exit.cannotRun, "no permission");
  const asked: number[] = [];
  const run = seriesOf("-n 9", (at) => {
    asked.push(at);
    return at === 3 ? { reply: null, failure: denied } : {};
  });
  await assert.rejects(run, denied);
  assert.deepEqual(asked, [0, 1, 2, 3]);
});

Deno.test("a series ends with its first failure, or with the first wrong mark", async () => {
  const empty = "empty reply", wrong = "rewritten";
  for (
    const [outcomes, code, message] of [
      [[{}, {}, {}], undefined, undefined],
      [[{}, LOST, {}], 52, `1 of 3 requests failed; the first: ${empty}`],
      [[LOST, WRONG, LOST], 101, `2 of 3 requests failed; first wrong mark: ${wrong}`],
      [[WRONG, {}, WRONG], 101, undefined],
    ] as const
  ) {
    const { failure } = await seriesOf("-n 3", (at) => outcomes[at - 1] ?? LOST);
    assert.equal(failure?.code, code);
    if (message !== undefined) assert.equal(failure?.message, message);
  }
});

Deno.test("the failure of a series has the counts of all its requests", () => {
  const rows = [new Row(markOf(0xb8)), new Row(markOf(0))];
  const first = new Failure(Exit.timeout, "it took long"), wrong = new Failure(102, "rewritten");
  rows[0].requests = 3;
  rows[1].requests = 2;
  assert.equal(seriesFailure(rows, null), null);
  rows[1].failed = 1;
  const failed = seriesFailure(rows, first)!;
  assert.equal(failed.message, "1 of 5 requests failed; the first: it took long");
  assert.equal(failed.code, Exit.timeout);
  rows[0].wrong = 2;
  const both = "1 of 5 requests failed, 2 of 5 requests with a wrong mark";
  assert.equal(seriesFailure(rows, wrong)!.message, `${both}; first wrong mark: rewritten`);
  assert.equal(seriesFailure(rows, first)!.message, `${both}; the first: it took long`);
  rows[1].failed = 0;
  const only = "2 of 5 requests with a wrong mark; the first: rewritten";
  assert.equal(seriesFailure(rows, wrong)!.message, only);
});

Deno.test("a signal ends a series also while it waits", async () => {
  const { failure, asked } = await seriesOf("-n 9 --interval 1000 -m 0", (at) => {
    // The signal comes when the series has begun to wait.
    if (at === 0) setTimeout(() => Deno.kill(Deno.pid, "SIGTERM"));
    return {};
  });
  assert.deepEqual([failure?.code, failure?.message], [143, "interrupted"]);
  assert.ok(asked.filter((name) => name === "EF").length <= 2, asked.join());
});

Deno.test("a row counts what became of its requests", () => {
  const sentWith = (tos: number, proved: boolean | null) => {
    const packet = { tos } as Exchange["sent"]["packets"][number];
    return { ...NOT_OBSERVED, proved, packets: [packet] };
  };
  const arrival = (
    kept: boolean | null,
    marked: number[],
    ...changes: Arrival["changes"]
  ): Partial<Arrival> => ({ kept, marked, changes });
  const syn = { packet: "SYN", sent: 0, wanted: 0, arrived: 0x20 } as const;
  const data = { packet: "data", sent: 0xb8, wanted: 0xb8, arrived: 0x20 } as const;
  const timeout = { failure: new Failure(Exit.timeout, "") };
  const connection = {} as Exchange["connection"];
  const packet = { tos: 0xb8, sequence: 1, payload: 100 } as Exchange["sent"]["packets"][number];
  const once = { ...NOT_OBSERVED, packets: [packet] };
  const twice = { ...NOT_OBSERVED, packets: [packet, packet], repeats: 1 };
  const isOver = { milliseconds: { connect: 4, firstByte: 5, total: 6 } };
  const half = { reply: { ...exchangeOf(markOf(0)).reply!, complete: false } };
  for (
    const [rest, expected] of [
      [{}, { total: [3], connect: [1] }],
      [isOver, { total: [6], connect: [4] }],
      [{ ...half, ...timeout }, { failed: 1, total: [NaN], connect: [NaN] }],
      [{ ...WRONG, sent: sentWith(0x20, false) }, { wrong: 1, sent: [0x20] }],
      [{ ...WRONG, ...half, sent: sentWith(0x20, false) }, { wrong: 1, failed: 1, total: [NaN] }],
      [{ sent: sentWith(0xb8, null) }, { sent: [0xb8] }],
      [{ sent: { ...sentWith(0xb8, true), outerTos: 0 } }, { sent: [0xb8, 0] }],
      [{ arrived: arrival(true, [0xb8, 0x28]) }, { arrived: [0xb8, 0x28] }],
      [{ arrived: arrival(null, []) }, { arrived: [], kept: 0, isArrivedWrong: false }],
      [{ arrived: arrival(true, [0xb8]) }, { kept: 1, isArrivedWrong: false }],
      [{ arrived: arrival(false, [0x20]) }, { kept: 0, wrong: 1, isArrivedWrong: true }],
      [{ sent: sentWith(0x20, false) }, { wrong: 1, isSentWrong: true }],
      [{ sent: sentWith(0xb8, null) }, { isSentWrong: false }],
      [{ ...timeout, reply: null }, { failed: 1, answered: 0, lost: 0 }],
      [{ ...timeout, reply: null, markSyn: true }, { failed: 1, lost: 1, lostUnseen: 0 }],
      [{ ...timeout, reply: null, connection }, { failed: 1, lost: 1, lostUnseen: 1 }],
      [{ ...timeout, reply: null, connection, sent: once }, { failed: 1, lost: 0 }],
      [{ ...timeout, reply: null, connection, sent: twice }, { failed: 1, lost: 1, lostUnseen: 0 }],
      [{ ...timeout, connection, sent: twice }, { failed: 1, answered: 1, lost: 0 }],
      [{ ...LOST, connection, sent: twice }, { failed: 1, answered: 0, lost: 0 }],
      [{ arrived: arrival(false, [0x20], data) }, { wrong: 1, arrived: [0x20], changed: [] }],
      [{ arrived: arrival(false, [0xb8], syn) }, { wrong: 1, changed: ["SYN 0x20"] }],
      [{ returned: { sent: 0xb8, arrived: 0, kept: false } }, { wrong: 1 }],
      [{ returned: { sent: 0xb8, arrived: null, kept: null } }, { wrong: 0 }],
      [{ arrived: arrival(false, [], syn), markSyn: true }, { wrong: 1, changed: [] }],
    ] as const
  ) {
    const row = new Row(markOf(0xb8));
    row.add(exchangeOf(row.mark, rest as Partial<Exchange>));
    const { sent, arrived, changed, ...plain } = row;
    const seen = { ...plain, sent: [...sent], arrived: [...arrived], changed: [...changed] };
    const same = { requests: 1, failed: 0, wrong: 0 };
    const kept = Object.fromEntries(
      Object.keys({ ...same, ...expected }).map((key) => [key, seen[key as keyof typeof seen]]),
    );
    assert.deepEqual(kept, { ...same, ...expected }, JSON.stringify(rest));
  }
});
