import { readdir, readFile } from 'node:fs/promises';
import path from 'node:path';
import { parse } from 'yaml';
import { z } from 'zod';
import { AppError, errnoOf } from '../lib/errors.js';
import { environmentName, SETTINGS, type Setting } from './schema.js';

/** Settings given in one place: dotted name → value. */
export interface Layer {
  /** A file's path or `environment`; for error messages and `holdfast config show`. */
  source: string;
  values: Map<string, unknown>;
}

const MAX_FILE_BYTES = 1024 * 1024;
const SETTING_NAMES = new Set(SETTINGS.map((setting) => setting.name));
const SECTION_NAMES = new Set(
  SETTINGS.flatMap(({ name }) => {
    const parts = name.split('.');
    return parts.slice(1).map((_part, index) => parts.slice(0, index + 1).join('.'));
  }),
);

/** Variables with our prefix that are no settings of the daemon. */
const OTHER_VARIABLES = new Set([
  'HOLDFAST_CONFIG',
  'HOLDFAST_URL',
  'HOLDFAST_TOKEN',
  'HOLDFAST_TOKEN_FILE',
  'HOLDFAST_CA_FILE',
]);
const TEST_VARIABLE_PREFIX = 'HOLDFAST_TEST_';

export function configInvalid(message: string, details: Record<string, unknown>): AppError {
  return new AppError('CONFIG_INVALID', message, { details });
}

/** Reads a YAML file into a layer; undefined when there is none. CONFIG_INVALID for what is no mapping of known settings. */
export async function readFileLayer(file: string): Promise<Layer | undefined> {
  let text: string;
  try {
    text = await readFile(file, 'utf8');
  } catch (error) {
    if (errnoOf(error) === 'ENOENT') return undefined;
    throw new AppError('CONFIG_INVALID', `${file} cannot be read`, { cause: error, details: { file } });
  }
  if (text.length > MAX_FILE_BYTES) throw configInvalid(`${file} is larger than 1 MiB`, { file });
  const content = parseYaml(text, file);
  const values = new Map<string, unknown>();
  flatten({ value: content, prefix: '', source: file }, values);
  return { source: file, values };
}

function parseYaml(text: string, file: string): unknown {
  try {
    // YAML aliases are of no use here and can blow up a small file.
    return parse(text, { maxAliasCount: 0, uniqueKeys: true, prettyErrors: true, logLevel: 'error' });
  } catch (error) {
    // Only the first line, and no cause: the rest shows the faulty text, which may hold a password.
    const message = error instanceof Error ? (error.message.split('\n')[0] ?? '') : String(error);
    throw configInvalid(`${file} is not valid YAML: ${message}`, { file });
  }
}

function flatten(
  node: { value: unknown; prefix: string; source: string },
  values: Map<string, unknown>,
): void {
  const { value, prefix, source } = node;
  // An empty file, or a section with everything in it commented out.
  if (value === null) return;
  if (typeof value !== 'object' || Array.isArray(value)) {
    const what = prefix === '' ? source : `${prefix.slice(0, -1)} in ${source}`;
    throw configInvalid(`${what} must be a mapping of settings`, {
      key: prefix.slice(0, -1),
      file: source,
    });
  }
  for (const [key, inner] of Object.entries(value)) {
    const name = prefix + key;
    if (SETTING_NAMES.has(name)) values.set(name, inner);
    else if (SECTION_NAMES.has(name)) flatten({ value: inner, prefix: `${name}.`, source }, values);
    else throw configInvalid(`${name} in ${source} is not a known setting`, { key: name, file: source });
  }
}

/** The drop-in files `conf.d/*.yaml` beside the file, sorted by name. No directory means none. */
export async function listDropIns(file: string): Promise<string[]> {
  const directory = path.join(path.dirname(file), 'conf.d');
  try {
    const names = await readdir(directory);
    return names
      .filter((name) => name.endsWith('.yaml') && !name.startsWith('.'))
      .sort()
      .map((name) => path.join(directory, name));
  } catch (error) {
    if (errnoOf(error) === 'ENOENT') return [];
    throw new AppError('CONFIG_INVALID', `${directory} cannot be listed`, {
      cause: error,
      details: { file: directory },
    });
  }
}

/** The settings in HOLDFAST_… variables. An unknown one is refused, so that a misspelt one is noticed. */
export function readEnvironmentLayer(env: Readonly<Record<string, string | undefined>>): Layer {
  const byVariable = new Map(SETTINGS.map((setting) => [environmentName(setting.name), setting]));
  const values = new Map<string, unknown>();
  for (const [variable, text] of Object.entries(env)) {
    if (!variable.startsWith('HOLDFAST_') || text === undefined) continue;
    if (OTHER_VARIABLES.has(variable) || variable.startsWith(TEST_VARIABLE_PREFIX)) continue;
    const setting = byVariable.get(variable);
    if (setting === undefined) {
      throw configInvalid(`environment variable ${variable} is not a known setting`, {
        key: variable,
        file: 'environment',
      });
    }
    values.set(setting.name, parseVariable(setting, text));
  }
  return { source: 'environment', values };
}

/** Numbers as decimal digits, lists separated by commas, empty for null where the setting can be null. */
function parseVariable(setting: Setting, text: string): unknown {
  const schema = setting.schema instanceof z.ZodDefault ? setting.schema.unwrap() : setting.schema;
  if (schema instanceof z.ZodNullable && text === '') return null;
  if (schema instanceof z.ZodArray) return text.split(',').map((item) => item.trim());
  if (schema instanceof z.ZodNumber && /^\d{1,15}$/.test(text)) return Number(text);
  return text;
}
