/**
 * What a user probably meant: hints on a wrong command line.
 *
 * @module
 */

import { hex, type Mark, parseDscp, parseTos } from "../ffi/dscp.ts";
import { Exit, Failure } from "./failure.ts";
import { printable, quote } from "./text.ts";

/** A wrong command line. */
export function usageError(message: string, hint = "--help lists the options"): Failure {
  return new Failure(Exit.usage, printable(message), hint);
}

export const LIST_HINT = "-d takes one list, with commas and without blanks: -d EF,AF41";

/** What a value of `-d` was meant to be, if it is a byte. */
export function byteHint(text: string): string | undefined {
  const mark = tryParse(parseTos, text);
  if (mark === undefined) return undefined;
  const name = mark.name ?? `DSCP ${mark.dscp}`;
  return `if the whole byte is meant: --tos ${hex(mark.tos)}, which is ${name}`;
}

/** What a value of `--tos` was meant to be, if it is a DSCP or has no 0x. */
export function dscpHint(text: string): string | undefined {
  const mark = tryParse(parseDscp, text);
  if (mark !== undefined) return `did you mean -d ${mark.name ?? mark.dscp}?`;
  const isHex = tryParse(parseTos, `0x${text}`) !== undefined;
  return isHex ? `did you mean hexadecimal? --tos 0x${text}` : undefined;
}

/**
 * Takes no name of a mark for a host; a number only behind a list of marks, `isListed`.
 *
 * @throws {Failure} one of `urls` is a mark, as in `-d EF AF41`
 */
export function refuseMarks(urls: readonly string[], isListed: boolean): void {
  // Most URLs are no word: throwing and catching an error costs about 0.2 ms.
  const word = isListed ? /^[\w-]+$/ : /^[A-Za-z][\w-]*$/;
  const name = urls.find((url) => word.test(url) && tryParse(parseDscp, url) !== undefined);
  if (name === undefined) return;
  const message = `'${name}' is a mark, not a URL; a host of that name is http://${name}/`;
  throw usageError(message, isListed ? LIST_HINT : `did you mean -d ${name}?`);
}

function tryParse(parse: (text: string) => Mark, text: string): Mark | undefined {
  try {
    return parse(text);
  } catch {
    return undefined;
  }
}

// Options of curl, and what does it here.
const GET_ONLY = "requests are GET and have no body";
const HEADER = (name: string) => `-H '${name}: …' does it here`;
const CURL: Record<string, string> = {
  "-v --verbose": "the report is printed anyway, --json has all that is known; -V is the version",
  "-L --location": "redirects are not followed: -i shows the Location header, ask for that URL",
  "-o --output -O --remote-name": "the body goes to standard output: dscp-get URL >FILE",
  "-x --proxy": "there is no proxy here: its packets would be its own, without the mark",
  "-X --request -G --get -F --form -T --upload-file": GET_ONLY,
  "-I --head": `${GET_ONLY}; -i prints the reply's headers too`,
  "--data --data-raw --data-binary --data-urlencode": GET_ONLY,
  "-u --user": "-H 'Authorization: Basic …' does it here, with the base64 of user:password",
  "-A --user-agent": HEADER("User-Agent"),
  "-e --referer": HEADER("Referer"),
  "-b --cookie": HEADER("Cookie"),
  "-c --cookie-jar": "cookies are not kept: -H 'Cookie: …' sends one",
  "-r --range": HEADER("Range"),
  "--compressed": "-H 'Accept-Encoding: gzip' asks for it; the body is printed as it comes",
  "-w --write-out": "--json has status, times and sizes",
  "--resolve --connect-to": "nothing does it here: put the address into the URL, with -H 'Host: …'",
  "--interface": "nothing does it here: the kernel's routes choose the interface",
  "-E --key": "nothing does it here: there are no client certificates",
  "--http1.0 --http1.1 --http2 --http3": "requests are HTTP/1.1",
  "--retry": "nothing does it here: a request is sent once; -n repeats it",
  "--path-as-is": "paths are always sent as they are",
  "--mark": "-d sets the mark, --mark-syn sets it for the handshake too",
};

/** An option that does not exist. @param names the options that do, as `--name` */
export function unknownOption(given: string, names: readonly string[]): Failure {
  const message = `unknown option ${quote(given)}`;
  if (/^--(allow|deny|unstable|no-prompt|no-check|quiet|reload|config|cert|v8-flags)/.test(given)) {
    return usageError(message, "options of Deno go before main.ts: deno run --allow-net …");
  }
  const [, known] = Object.entries(CURL).find(([flags]) => flags.split(" ").includes(given)) ?? [];
  if (known !== undefined) return usageError(message, known);
  const near = given.startsWith("--") ? nearest(given, names) : undefined;
  return usageError(message, near && `did you mean ${near}?`);
}

/** The name that is nearest to what was typed, if it is near at all. */
function nearest(given: string, names: readonly string[]): string | undefined {
  return names
    .map((name) => ({ name, distance: distance(given, name) }))
    .filter(({ name, distance }) => distance <= Math.min(3, name.length / 3))
    .sort((a, b) => a.distance - b.distance)
    .at(0)?.name;
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
