import { z } from 'zod';
import { sourceOf } from './load.js';
import { environmentName, SETTINGS, type Config } from './schema.js';

export interface ConfigRow {
  /** Dotted name, as in files. */
  name: string;
  /** HOLDFAST_… variable that sets it. */
  variable: string;
  /** As text; passwords in URLs masked. */
  value: string;
  default: string;
  unit: string;
  comment: string;
  /** A file, an environment variable, or `default`. */
  source: string;
}

/** Every setting with its value and where that came from, for `holdfast config show`. Holds no secret. */
export function describeConfig(config: Config): ConfigRow[] {
  return SETTINGS.map(({ name, schema, meta }) => {
    const value = valueOf(config, name);
    const fallback: unknown = schema instanceof z.ZodDefault ? schema.def.defaultValue : undefined;
    return {
      name,
      variable: environmentName(name),
      value: meta.isSecretUrl === true && typeof value === 'string' ? maskUrl(value) : toText(value),
      default: toText(fallback),
      unit: meta.unit ?? '',
      comment: meta.comment,
      source: sourceOf(config, name),
    };
  });
}

function valueOf(config: Config, name: string): unknown {
  let value: unknown = config;
  for (const part of name.split('.')) {
    value =
      typeof value === 'object' && value !== null ? (value as Record<string, unknown>)[part] : undefined;
  }
  return value;
}

function toText(value: unknown): string {
  if (value === null || value === undefined) return '';
  if (Array.isArray(value)) return value.map(String).join(', ');
  return typeof value === 'string' ? value : JSON.stringify(value);
}

/** Password and query values replaced: a query can carry a password too. */
function maskUrl(text: string): string {
  const url = new URL(text);
  if (url.password !== '') url.password = '***';
  for (const key of [...url.searchParams.keys()]) url.searchParams.set(key, '***');
  return url.toString();
}
