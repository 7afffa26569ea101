import { AppError } from '../lib/errors.js';

/** One section of a file in GLib's key-file format, which nbd-server reads its configuration with. */
export interface IniSection {
  name: string;
  values: Map<string, string>;
}

/** Other white space of Unicode is part of a value. */
const BLANKS_AROUND = /^[ \t\r]+|[ \t\r]+$/g;

/** GKeyFile's escapes; `\s` keeps a space at the beginning or end of a value. */
const ESCAPES: Record<string, string> = { s: ' ', n: '\n', t: '\t', r: '\r', '\\': '\\' };

function invalid(line: number, problem: string): AppError {
  return new AppError('INVALID_INPUT', `line ${line}: ${problem}`, { details: { line } });
}

/**
 * Parses a file with exactly one section. INVALID_INPUT, with the line, for anything else: stricter than
 * GKeyFile, which lets a later key of the same name win and passes over what stands before a section.
 */
export function parseIniSection(text: string): IniSection {
  let section: IniSection | undefined;
  for (const [index, raw] of text.split('\n').entries()) {
    const line = raw.replace(BLANKS_AROUND, '');
    const number = index + 1;
    if (line === '' || line.startsWith('#')) continue;
    if (line.startsWith('[')) {
      if (section !== undefined) throw invalid(number, 'a second section; a file holds one export');
      if (!line.endsWith(']')) throw invalid(number, 'a section name without its closing bracket');
      section = { name: line.slice(1, -1), values: new Map() };
      continue;
    }
    if (section === undefined) throw invalid(number, 'a line before the section');
    addValue(section, line, number);
  }
  if (section === undefined) throw new AppError('INVALID_INPUT', 'no section names the export');
  return section;
}

export function formatIniSection({ name, values }: IniSection): string {
  const lines = [...values].map(([key, value]) => `${key} = ${escape(value)}`);
  return `[${name}]\n${lines.join('\n')}\n`;
}

function addValue(section: IniSection, line: string, number: number): void {
  const equals = line.indexOf('=');
  const key = line.slice(0, equals).trimEnd();
  if (equals === -1 || !/^[A-Za-z][A-Za-z0-9-]*$/.test(key))
    throw invalid(number, 'not a line `key = value`');
  if (section.values.has(key)) throw invalid(number, `a second ${key}`);
  section.values.set(key, unescape(line.slice(equals + 1).replace(BLANKS_AROUND, ''), number));
}

function unescape(text: string, number: number): string {
  return text.replace(/\\(.?)/gs, (_match, character: string) => {
    const plain = ESCAPES[character];
    if (plain === undefined) throw invalid(number, `an unknown escape \\${character}`);
    return plain;
  });
}

function escape(text: string): string {
  return text
    .replaceAll('\\', '\\\\')
    .replaceAll('\n', '\\n')
    .replaceAll('\r', '\\r')
    .replaceAll('\t', '\\t')
    .replace(/^ | $/g, '\\s');
}
