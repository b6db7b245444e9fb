import assert from "node:assert/strict";
import { Exit, Failure } from "../main.ts";
import type { Stage } from "../src/failure.ts";
import { Limits } from "../src/limits.ts";
import { localTarget, parseTarget } from "../src/target.ts";
import { execute } from "./support/processes.ts";

/** Waits until a request is over, ten seconds at the most. @returns why it is */
async function end(signal: AbortSignal): Promise<Failure> {
  const atMost = AbortSignal.timeout(10_000);
  if (!signal.aborted) {
    await new Promise((resolve) => {
      for (const each of [signal, atMost]) each.addEventListener("abort", resolve);
    });
  }
  assert.ok(signal.aborted, "not over after ten seconds");
  return signal.reason;
}

/** Lets time pass, by a limit of its own. */
async function pass(seconds: number): Promise<void> {
  await end(new Limits({ connectTimeout: seconds, maxTime: 0 }).begin(TARGET));
}

const TARGET = localTarget("127.0.0.1", 80);

Deno.test("a request that takes too long is 28, and the failure names what it was waiting for", async () => {
  const [name, six] = [parseTarget("http://a.test/"), localTarget("::1", 8086)];
  const short = 0.002, long = 1000;
  const rows: [typeof TARGET, Stage, number, number, string][] = [
    [TARGET, "connecting", short, long, "connecting to 127.0.0.1:80 took longer than"],
    [six, "connecting", short, long, "connecting to [::1]:8086 took longer than"],
    [name, "connecting", short, long, "looking up or connecting to a.test:80 took longer than"],
    [TARGET, "securing", short, long, "the TLS handshake with 127.0.0.1:80 was not over after"],
    [name, "securing", short, 0, "the TLS handshake with a.test:80 was not over after"],
    [TARGET, "connecting", long, short, "the request to 127.0.0.1:80 took longer than"],
    [name, "securing", 0, short, "the request to a.test:80 took longer than"],
    [TARGET, "connected", 0.001, short, "the request to 127.0.0.1:80 took longer than"],
    [TARGET, "connected", short, short, "the request to 127.0.0.1:80 took longer than"],
  ];
  for (const [target, stage, connectTimeout, maxTime, words] of rows) {
    const limits = new Limits({ connectTimeout, maxTime }), signal = limits.begin(target);
    limits.stage = stage;
    const { code, message } = await end(signal);
    assert.deepEqual([code, message], [Exit.timeout, `${words} ${short} seconds`]);
  }
});

Deno.test("0 is no limit, and a request that has ended is not over again", async () => {
  const none = new Limits({ connectTimeout: 0, maxTime: 0 }).begin(TARGET);
  const ended = new Limits({ connectTimeout: 0.001, maxTime: 0.001 });
  const connected = new Limits({ connectTimeout: 0.001, maxTime: 0 });
  const signals = [none, ended.begin(TARGET), connected.begin(TARGET)];
  ended.end();
  connected.stage = "connected";
  await pass(0.03);
  assert.deepEqual(signals.map(({ aborted }) => aborted), [false, false, false]);
});

Deno.test("a timer of an earlier request ends no later one before its time", async () => {
  const limits = new Limits({ connectTimeout: 0, maxTime: 0.05 });
  limits.begin(TARGET);
  limits.end();
  await pass(0.02);
  const started = performance.now();
  await end(limits.begin(TARGET));
  assert.ok(performance.now() - started >= 50);
});

Deno.test("a limit holds though the timer of an earlier request has fired meanwhile", async () => {
  const limits = new Limits({ connectTimeout: 0, maxTime: 0.002 });
  limits.begin(TARGET);
  limits.end();
  await pass(0.03);
  assert.equal((await end(limits.begin(TARGET))).code, Exit.timeout);
});

Deno.test("the limit on connecting holds again for the next request, though a later timer is set", async () => {
  const limits = new Limits({ connectTimeout: 0.005, maxTime: 1000 });
  limits.begin(TARGET);
  limits.stage = "connected";
  await pass(0.05);
  limits.end();
  assert.match((await end(limits.begin(TARGET))).message, /^connecting to /);
});

Deno.test("once stopped, the current request and all that follow are over for that reason", () => {
  const limits = new Limits({ connectTimeout: 10, maxTime: 10 });
  const reason = new Failure(130, "interrupted"), signal = limits.begin(TARGET);
  assert.deepEqual([signal.aborted, limits.stopped], [false, null]);
  limits.stop(reason);
  assert.deepEqual([signal.reason, limits.stopped], [reason, reason]);
  limits.end();
  assert.equal(limits.begin(TARGET).reason, reason);
  limits.end();
});

Deno.test("a request that was over is not the end of the next", async () => {
  const limits = new Limits({ connectTimeout: 0, maxTime: 0.002 });
  await end(limits.begin(TARGET));
  limits.end();
  assert.equal(limits.begin(TARGET).aborted, false);
  limits.end();
});

Deno.test("what a request waits for until it is connected is known, and nothing before or after", () => {
  const limits = new Limits({ connectTimeout: 10, maxTime: 10 });
  const said = [limits.waitsFor];
  limits.begin(parseTarget("http://a.test/"));
  for (const stage of ["connecting", "securing", "connected"] as const) {
    limits.stage = stage;
    said.push(limits.waitsFor);
  }
  limits.begin(TARGET);
  said.push(limits.waitsFor);
  limits.end();
  assert.deepEqual([...said, limits.waitsFor], [
    null,
    "looking up or connecting to a.test:80",
    "the TLS handshake with a.test:80",
    null,
    "connecting to 127.0.0.1:80",
    null,
  ]);
});

Deno.test("no timer keeps a program alive whose requests have ended", async () => {
  const program = `import { Limits } from ${
    JSON.stringify(import.meta.resolve("../src/limits.ts"))
  };
    const limits = new Limits({ connectTimeout: 0.01, maxTime: 100 });
    const target = { host: "127.0.0.1", port: 80 };
    limits.begin(target);
    limits.stage = "connected";
    // By then the timer is set for the end.
    await new Promise((resolve) => setTimeout(resolve, 100));
    limits.end();
    limits.begin(target);
    limits.end();
    Deno.unrefTimer(setTimeout(() => console.log("something else does"), 2000));`;
  const { code, stdout, stderr } = await execute([Deno.execPath(), "eval", program]);
  assert.deepEqual([code, stdout, stderr], [0, "", ""]);
});
