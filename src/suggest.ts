/**
 * What a user probably meant: hints on a wrong command line.
 *
 * @module
 */

import { Exit, Failure } from "./failure.ts";
import { printable, quote } from "./text.ts";

/** A wrong command line. */
export function usageError(message: string, hint = "--help lists the options"): Failure {
  return new Failure(Exit.usage, printable(message), hint);
}

/** An option that does not exist. @param names the options that do, as `--name` */
export function unknownOption(given: string, names: readonly string[]): Failure {
  const message = `unknown option ${quote(given)}`;
  if (/^--(allow|deny|unstable|no-prompt|no-check|quiet|reload|config|cert|v8-flags)/.test(given)) {
    return usageError(message, "options of Deno go before main.ts: deno run --allow-net …");
  }
  const [near] = given.startsWith("--") ? nearest(given, names) : [];
  return usageError(message, near === undefined ? undefined : `did you mean ${near}?`);
}

/** Those names that a typing mistake may have made of it, the nearest first. */
function nearest(given: string, names: readonly string[]): string[] {
  return names
    .map((name) => ({ name, distance: distance(given, name) }))
    .filter(({ name, distance }) => distance <= Math.min(3, name.length / 3))
    .sort((a, b) => a.distance - b.distance)
    .map(({ name }) => name);
}

/** How many letters to add, drop or change to make one word of another (Levenshtein). */
function distance(from: string, to: string): number {
  let row = Array.from({ length: to.length + 1 }, (_, at) => at);
  for (let i = 1; i <= from.length; i++) {
    const next = [i];
    for (let j = 1; j <= to.length; j++) {
      const change = row[j - 1] + (from[i - 1] === to[j - 1] ? 0 : 1);
      next.push(Math.min(row[j] + 1, next[j - 1] + 1, change));
    }
    row = next;
  }
  return row[to.length];
}
