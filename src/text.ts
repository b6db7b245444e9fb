/**
 * Text for people: quoting, escaping, wrapping, plurals. Whatever came from the network or the
 * command line passes through here before it is printed.
 *
 * @module
 */

/** Escapes control and bidirectional formatting characters, so that text is safe to print. */
export function printable(text: string): string {
  // Nearly all text is plain, and the classes below take 0.4 ms to compile.
  if (/^[ -~]*$/.test(text)) return text;
  return text.replace(/[\p{Cc}\p{Cf}\p{Zl}\p{Zp}\p{Cs}]/gu, (c) => {
    const code = c.codePointAt(0)!.toString(16);
    return code.length <= 2 ? `\\x${code.padStart(2, "0")}` : `\\u{${code}}`;
  });
}

/** The beginning of a text that may be long, safe to print. */
export function excerpt(text: string): string {
  return printable(text.length > 200 ? `${text.slice(0, 200)}…` : text);
}

export function quote(text: string): string {
  return `'${printable(text)}'`;
}

export function plural(count: number, unit: string): string {
  return `${count} ${unit}${count === 1 ? "" : "s"}`;
}

/** Wraps text at `width` columns; a longer word gets its own line, and each line its end. */
export function wrap(text: string, width: number): string {
  // Most lines fit, and the expression takes 0.2 ms to compile.
  if (text.length <= width && /.$/.test(text)) return `${text}\n`;
  width = Math.max(1, width);
  return text.replace(new RegExp(`([^ ]{${width},}|.{1,${width}})(?: |$)`, "g"), "$1\n");
}

/** The message of a system or TLS error, without the number or the link that Deno adds. */
export function errorText(error: Error): string {
  const bare = error.message.replace(/ \(os error \d+\)(: .*)?$|: https:\/\/\S+$|: $/, "");
  return printable(bare.replace(/^[A-Z](?![A-Z])/, (c) => c.toLowerCase()));
}

// By hand: a regular expression takes quadratic time for blanks with another character behind them.
export function trimmed(text: string): string {
  let from = 0, to = text.length;
  while (from < to && " \t".includes(text[from])) from++;
  while (to > from && " \t".includes(text[to - 1])) to--;
  return text.slice(from, to);
}

/** Bytes as text, a character a byte. */
export function latin1(bytes: Uint8Array): string {
  // As many at once as fit the stack.
  const max = 8192;
  if (bytes.length <= max) return String.fromCharCode.apply(null, bytes as unknown as number[]);
  let text = "";
  for (let at = 0; at < bytes.length; at += max) text += latin1(bytes.subarray(at, at + max));
  return text;
}

/** Milliseconds in few characters: `0.42`, `17.3`, `1520`. */
export function shortTime(milliseconds: number): string {
  if (!Number.isFinite(milliseconds)) return "-";
  return milliseconds.toFixed(milliseconds < 1 ? 2 : milliseconds < 100 ? 1 : 0);
}
