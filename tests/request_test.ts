import assert from "node:assert/strict";
import { get, RequestFailure } from "../main.ts";
import { Exit, Failure, isPeerGone, rootCause } from "../src/failure.ts";
import { Background, command, inject, openDescriptors, testWith } from "./support/processes.ts";
import { closedPort, OK, RawServer, readRequest, replying, send } from "./support/servers.ts";
import { until } from "./support/waiting.ts";

Deno.test("the other end has gone if a write finds the connection broken, reset or aborted", () => {
  const { errors } = Deno;
  const gone = [errors.BrokenPipe, errors.ConnectionReset, errors.ConnectionAborted];
  for (const type of gone) assert.equal(isPeerGone(new type("")), true, type.name);
  for (const type of [errors.TimedOut, errors.BadResource, errors.ConnectionRefused, Error]) {
    assert.equal(isPeerGone(new type("")), false, type.name);
  }
  assert.equal(isPeerGone(null), false);
});

Deno.test("a failed write is the cause of an empty reply, and not of a malformed one", () => {
  const write = new Error("write"), lost = new Error("lost");
  const [empty, bad] = [Exit.emptyReply, Exit.badReply].map((code) => new Failure(code, ""));
  assert.equal(rootCause(empty, write), write);
  assert.equal(rootCause(empty, null), empty);
  assert.equal(rootCause(bad, write), bad);
  assert.equal(rootCause(lost, write), write);
  assert.equal(rootCause(lost, null), lost);
});

testWith(
  ["strace"],
  "a write that fails for another reason ends the request at once: 56",
  async () => {
    // The server would answer only to a request; without an end the run would take 5 seconds.
    await using server = new RawServer(async (conn) => {
      await readRequest(conn);
      await send(conn, OK);
    });
    const fault = (n: number) => `error=ENOBUFS:when=${n}`;
    const args = ["-s", "-m", "5", server.url];
    const { code, stderr } = await inject("sendto", "GET / HTTP", fault, args);
    assert.equal(code, 56, stderr);
    assert.match(stderr, /^dscp-get: the connection was lost: no buffer space available$/m);
  },
);

Deno.test("a reply can be read although the other end has reset the connection for writing", async () => {
  await using server = replying("HTTP/1.1 400 No\r\nContent-Length: 2\r\n\r\nno");
  const { reply } = await get(server.url, { headers: [["X", "x".repeat(100_000)]] });
  assert.deepEqual([reply?.status, reply?.complete], [400, true]);
});

Deno.test("get() throws what happened with the exchange as far as it came", async () => {
  await using server = replying("HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf");
  const failure = await get(server.url).catch((error) => error);
  assert.ok(failure instanceof RequestFailure);
  assert.deepEqual([failure.code, failure.exchange.reply?.bodyBytes], [18, 4]);
  assert.equal(failure.exchange.sent.proved, true);
});

Deno.test("what a sink throws comes out as it is, and the connection is closed", async () => {
  await using server = replying("HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nbody");
  const before = openDescriptors(), mine = new Error("mine");
  const sink = { body: () => Promise.reject(mine) };
  await assert.rejects(get(server.url, {}, sink), (error) => error === mine);
  await until(() => openDescriptors() <= before + 1, "the connection's end");
});

Deno.test("connected and mark are printed before the reply comes", async () => {
  await using server = new RawServer(async (conn) => {
    await readRequest(conn);
    await run.until((said) => /^connected .*\nmark .*\n$/.test(said));
    await send(conn, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n");
  });
  await using run = new Background(command([server.url]));
  assert.equal((await run.end()).code, 0);
  assert.match(run.said, /^connected .*\nmark .*\nsent .*\nreply .*\nhandshake .*\n$/);
});

Deno.test("a request's total time is that since it began, also if it fails", async () => {
  await using server = replying(OK);
  const failing = `http://127.0.0.1:${closedPort()}/`;
  for (const url of [server.url, failing]) {
    const began = performance.now();
    const exchange = await get(url).catch((error) => (error as RequestFailure).exchange);
    const { milliseconds: { total }, started } = exchange;
    assert.ok(began <= started && total! > 0 && started + total! <= performance.now(), `${total}`);
  }
});
