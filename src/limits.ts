/**
 * The time limits of a request: one for connecting, one for all of it.
 *
 * @module
 */

import { formatAddress } from "../ffi/mod.ts";
import type { RequestOptions, TimeLimits } from "./exchange.ts";
import { Exit, Failure } from "./failure.ts";
import type { Target } from "./target.ts";
import { plural } from "./text.ts";

/** The limits of requests, one after the other. */
export class Limits implements TimeLimits {
  /** Why all requests end, once a signal has stopped them. */
  stopped: Failure | null = null;
  readonly #options: Pick<RequestOptions, "connectTimeout" | "maxTime">;
  #abort: AbortController | null = null;
  #target: Target | null = null;
  /** When the current request must be connected, and over, on the clock of `performance.now()`. */
  #connectBy = Infinity;
  #endBy = Infinity;
  /**
   * One timer for both limits and for all requests: each would keep 0.6 KiB until it fires. The
   * first `setTimeout` of a process takes 3.5 to 4.5 ms, a sixth of a plain run, and this 0.3 ms.
   */
  #alarm: AbortSignal | null = null;
  #alarmAt = Infinity;

  /** Limits without a request. @param options seconds; 0 is no limit */
  constructor(options: Pick<RequestOptions, "connectTimeout" | "maxTime">) {
    this.#options = options;
  }

  /** Begins a request. @returns aborts, with a {@linkcode Failure}, when its time is over */
  begin(target: Target): AbortSignal {
    const { maxTime, connectTimeout } = this.#options, now = performance.now();
    this.#abort = new AbortController();
    this.#target = target;
    this.#endBy = maxTime > 0 ? now + maxTime * 1000 : Infinity;
    this.#connectBy = connectTimeout > 0 ? now + connectTimeout * 1000 : Infinity;
    this.#setAlarm();
    if (this.stopped !== null) this.#abort.abort(this.stopped);
    return this.#abort.signal;
  }

  /** Lifts the limit on connecting. */
  connected(): void {
    this.#connectBy = Infinity;
  }

  /** Lifts both limits. */
  end(): void {
    this.#endBy = this.#connectBy = Infinity;
    // Releases the request's memory; without a listener the alarm keeps no process alive.
    this.#alarm?.removeEventListener("abort", this.#onAlarm);
    this.#abort = null;
  }

  /** Ends the current request and all that follow. */
  stop(failure: Failure): void {
    this.stopped = failure;
    this.#fail(failure);
  }

  #fail(failure: Failure): void {
    const abort = this.#abort;
    this.end();
    abort?.abort(failure);
  }

  #setAlarm(): void {
    const due = Math.min(this.#endBy, this.#connectBy);
    if (due === Infinity) return;
    if (this.#alarm === null || this.#alarm.aborted || due < this.#alarmAt) {
      this.#alarm?.removeEventListener("abort", this.#onAlarm);
      this.#alarm = AbortSignal.timeout(Math.max(0, due - performance.now()));
      this.#alarmAt = due;
    }
    this.#alarm.addEventListener("abort", this.#onAlarm);
  }

  readonly #onAlarm = (): void => {
    const now = performance.now(), isOver = now >= this.#endBy;
    // It was set for an earlier request.
    if (!isOver && now < this.#connectBy) return this.#setAlarm();
    const { host: hostname, port, isHttps } = this.#target!;
    const where = formatAddress({ hostname, port });
    const { maxTime, connectTimeout } = this.#options;
    const message = isOver
      ? `the request to ${where} took longer than ${plural(maxTime, "second")}`
      : `connecting to ${where}${isHttps ? ", TLS's handshake included," : ""} ` +
        `took longer than ${plural(connectTimeout, "second")}`;
    this.#fail(new Failure(Exit.timeout, message));
  };
}
