/**
 * A URL → where to connect, and the bytes of the GET.
 *
 * @module
 */

import { formatAddress } from "../ffi/mod.ts";
import { Exit, Failure } from "./failure.ts";
import { quote } from "./text.ts";
import { VERSION } from "./version.ts";

/** Where a request goes. */
export interface Target {
  /** The URL as it is asked for, without fragment and zone. */
  readonly url: string;
  /** Whether it is https. */
  readonly isHttps: boolean;
  /** Host name or address, without brackets, with its zone: `fe80::1%eth0`. */
  readonly host: string;
  /** 1 to 65535. */
  readonly port: number;
  /** The Host header's value (RFC 9110 section 7.2). */
  readonly authority: string;
  /** Path and query, percent-encoded. */
  readonly path: string;
}

/** A header of the request: its name, and its value or `null` to leave it out. */
export type Header = readonly [name: string, value: string | null];

/** The host and port of a run without a URL. */
export const DEFAULT_HOST = "127.0.0.1", DEFAULT_PORT = 8086;

/** The root of a server at an address. */
export function localTarget(host: string, port: number): Target {
  return parseTarget(formatAddress({ hostname: host, port }));
}

/** Where a request goes if no URL is given. */
export function defaultTarget(family: 4 | 6 | null): Target {
  return localTarget(family === 6 ? "::1" : DEFAULT_HOST, DEFAULT_PORT);
}

/** Reads a URL as curl does: without a scheme it is http. @throws {Failure} bad URL, exit 3 */
export function parseTarget(text: string): Target {
  const bad = (why: string) => new Failure(Exit.badUrl, `bad URL ${quote(text)}: ${why}`);
  // The URL parser would silently drop these.
  if ([...text].some((c) => c < " " || c === "\x7f")) {
    throw bad("control characters are not allowed");
  }
  const scheme = /^([a-z][a-z0-9+.-]*):\/\//i.exec(text)?.[1].toLowerCase();
  if (scheme !== undefined && scheme !== "http" && scheme !== "https") {
    throw bad(`the scheme must be http or https, not ${scheme}`);
  }
  const full = /^https?:(?!\d)/i.test(text) ? text : `http://${text}`;
  // The zone of a link-local address, RFC 6874, as curl reads it: the URL parser takes none.
  const zoned = /^(https?:\/\/\[[^%\]]*)(%(?:25(?!\]))?([\w.~-]{1,15}))\]/i.exec(full);
  const bare = zoned === null ? full : zoned[1] + full.slice(zoned[1].length + zoned[2].length);
  const url = /^https?:\/\/[^/?#]/i.test(bare) ? URL.parse(bare) : null;
  if (url === null) throw bad("it should look like http://host:port/path, IPv6 in brackets");
  if (url.username !== "" || url.password !== "") {
    throw new Failure(
      Exit.badUrl,
      "user and password in the URL are not supported",
      "send them yourself: -H 'Authorization: Basic …' with the base64 of user:password",
    );
  }
  const isHttps = url.protocol === "https:";
  const port = url.port === "" ? (isHttps ? 443 : 80) : Number(url.port);
  if (port === 0) throw bad("port 0 is not a valid destination");
  const host = url.hostname.replace(/^\[(.*)\]$/, "$1");
  if (host === url.hostname && /[^\w.~-]/.test(host)) throw bad(`${quote(host)} is no host name`);
  url.hash = "";
  // The parser's own `search` has no question mark if the query is empty.
  const path = url.href.slice(url.origin.length);
  const zone = zoned === null ? "" : `%${zoned[3]}`;
  return { url: url.href, isHttps, host: host + zone, port, authority: url.host, path };
}

/** The bytes of the GET. */
export function encodeRequest(target: Target, headers: readonly Header[]): Uint8Array<ArrayBuffer> {
  const keyOf = ([name]: Header) => name.toLowerCase();
  const given = new Set(headers.map(keyOf));
  const standard: Header[] = [
    ["Host", target.authority],
    ["User-Agent", `dscp-get/${VERSION}`],
    ["Accept", "*/*"],
    ["Connection", "close"],
  ];
  const own = headers.filter(([, value]) => value !== null);
  // A request has one Host (RFC 9112 section 3.2): the first that is given, as curl's.
  const host = own.find((header) => keyOf(header) === "host");
  const lines = [
    ...standard.filter((header) => !given.has(keyOf(header))),
    ...own.filter((header) => keyOf(header) !== "host" || header === host),
  ].map(([name, value]) => `${name}: ${value}\r\n`);
  return new TextEncoder().encode(`GET ${target.path} HTTP/1.1\r\n${lines.join("")}\r\n`);
}
