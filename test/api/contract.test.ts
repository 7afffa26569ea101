import { readFileSync } from 'node:fs';
import path from 'node:path';
import { describe, expect, expectTypeOf, test } from 'vitest';
import { parse } from 'yaml';
import { createHandlers } from '../../src/api/handlers.js';
import type { components } from '../../src/api/generated.js';
import { PROBLEMS } from '../../src/api/problem.js';
import { loadSpec } from '../../src/api/spec.js';
import type * as views from '../../src/engine/types.js';
import type { SkipCode } from '../../src/source/source.js';
import { ERROR_CATALOGUE, ERROR_CODES } from '../../src/lib/errors.js';
import { FakeEngine } from './fake-engine.js';

const ROOT = path.join(import.meta.dirname, '../..');
const spec = loadSpec();

interface SpecDocument {
  paths: Record<string, Record<string, { responses: Record<string, unknown>; security?: unknown[] }>>;
  components: { schemas: Record<string, { enum?: string[]; type?: string; additionalProperties?: boolean }> };
}
const document = parse(spec.text) as SpecDocument;

test('each operation has one handler, and each handler an operation', () => {
  const ids = spec.operations.map(({ operationId }) => operationId);
  expect(new Set(ids).size).toBe(ids.length);
  expect(Object.keys(createHandlers(new FakeEngine())).sort()).toEqual(ids.sort());
});

describe('errors', () => {
  const reference = readFileSync(path.join(ROOT, 'docs/reference/errors.md'), 'utf8');

  test('the specification names the codes of the catalogue, all and no other', () => {
    expect(document.components.schemas['ErrorCode']?.enum).toEqual(ERROR_CODES);
  });

  test('the reference has a section for each code, and no other', () => {
    const sections = [...reference.matchAll(/^### `([A-Z_]+)`$/gm)].map((match) => match[1]);
    expect(sections.toSorted()).toEqual(ERROR_CODES.toSorted());
  });

  test.each(ERROR_CODES)('the reference tells status and remedy of %s', (code) => {
    const start = reference.indexOf(`### \`${code}\``);
    const end = reference.indexOf('\n### ', start + 1);
    const section = reference.slice(start, end === -1 ? undefined : end).replaceAll(/\s+/g, ' ');
    expect(section).toContain(`HTTP ${PROBLEMS[code].status}`);
    expect(section).toContain(ERROR_CATALOGUE[code].remedy);
  });

  test('the troubleshooting guide names only codes of the catalogue', () => {
    const guide = readFileSync(path.join(ROOT, 'docs/troubleshooting.md'), 'utf8');
    const named = [...guide.matchAll(/errors\.md#([a-z_]+)/g)].map((match) => match[1]!.toUpperCase());
    expect(named.length).toBeGreaterThan(10);
    expect(named.filter((code) => !Object.hasOwn(ERROR_CATALOGUE, code))).toEqual([]);
  });
});

test('the API reference names each operation', () => {
  const reference = readFileSync(path.join(ROOT, 'docs/reference/api.md'), 'utf8');
  for (const { method, path: route } of spec.operations) {
    expect(reference).toContain(`${method.toUpperCase()} ${route.replace('/api/v1', '')}`);
  }
});

test('every operation answers errors as problem, and only health is open', () => {
  for (const [route, methods] of Object.entries(document.paths)) {
    for (const operation of Object.values(methods)) {
      expect(operation.responses['default'], route).toEqual({ $ref: '#/components/responses/Problem' });
      expect(operation.security).toEqual(route === '/health' ? [] : undefined);
    }
  }
});

test('every object of the specification is closed, but for details', () => {
  const open = Object.entries(document.components.schemas)
    .filter(([, schema]) => schema.type === 'object' && schema.additionalProperties !== false)
    .map(([name]) => name);
  expect(open).toEqual(['Details']);
});

/** The view with branded ids as plain text, to compare it with what the specification says. */
type Plain<T> = T extends string
  ? string extends T
    ? string
    : T extends { readonly [key: symbol]: unknown }
      ? string
      : T
  : T extends readonly (infer Item)[]
    ? Plain<Item>[]
    : T extends object
      ? { [Key in keyof T]: Plain<T[Key]> }
      : T;
type KeysDeep<T> = T extends string | number | boolean | null | undefined
  ? never
  : T extends readonly (infer Item)[]
    ? KeysDeep<Item>
    : T extends object
      ? { [Key in keyof T]-?: (Key & string) | `${Key & string}.${KeysDeep<T[Key]>}` }[keyof T]
      : never;
type Schemas = components['schemas'];

test('the views of the engine and the schemas have the same keys, so that no answer fails its schema', () => {
  expectTypeOf<KeysDeep<views.RepositoryView>>().toEqualTypeOf<KeysDeep<Schemas['Repository']>>();
  expectTypeOf<KeysDeep<views.VmView>>().toEqualTypeOf<KeysDeep<Schemas['Vm']>>();
  expectTypeOf<KeysDeep<views.DiskView>>().toEqualTypeOf<KeysDeep<Schemas['Disk']>>();
  expectTypeOf<KeysDeep<views.BackupEstimate>>().toEqualTypeOf<KeysDeep<Schemas['BackupEstimate']>>();
  expectTypeOf<views.DiskEstimate['reason']['code']>().toEqualTypeOf<
    Schemas['DiskEstimate']['reason']['code']
  >();
  expectTypeOf<SkipCode>().toEqualTypeOf<Schemas['DiskSkip']['code']>();
  expectTypeOf<KeysDeep<views.BackupView>>().toEqualTypeOf<KeysDeep<Schemas['Backup']>>();
  expectTypeOf<KeysDeep<views.ChainView>>().toEqualTypeOf<KeysDeep<Schemas['Chain']>>();
  expectTypeOf<KeysDeep<views.BackupStats>>().toEqualTypeOf<KeysDeep<Schemas['BackupStats']>>();
  expectTypeOf<KeysDeep<views.RunView>>().toEqualTypeOf<KeysDeep<Schemas['Run']>>();
  expectTypeOf<KeysDeep<views.PushDiskView>>().toEqualTypeOf<KeysDeep<Schemas['PushDisk']>>();
  expectTypeOf<KeysDeep<views.ExportView>>().toEqualTypeOf<KeysDeep<Schemas['Export']>>();
  expectTypeOf<KeysDeep<views.ExportDaemonView>>().toEqualTypeOf<KeysDeep<Schemas['ExportDaemon']>>();
  expectTypeOf<KeysDeep<views.VolumeView>>().toEqualTypeOf<KeysDeep<Schemas['Volume']>>();
  expectTypeOf<KeysDeep<views.FoundDeviceView>>().toEqualTypeOf<KeysDeep<Schemas['FoundDevice']>>();
  expectTypeOf<KeysDeep<views.OperationView>>().toEqualTypeOf<KeysDeep<Schemas['Operation']>>();
  expectTypeOf<views.RunKind>().toEqualTypeOf<Schemas['RunKind']>();
  expectTypeOf<Plain<views.RunView>['request']['kind']>().toEqualTypeOf<Schemas['RunRequest']['kind']>();
  expectTypeOf<KeysDeep<views.RunEvent>>().toEqualTypeOf<KeysDeep<Schemas['RunEvent']>>();
  expectTypeOf<KeysDeep<views.TokenView>>().toEqualTypeOf<KeysDeep<Schemas['Token']>>();
  expectTypeOf<KeysDeep<views.DoctorFinding>>().toEqualTypeOf<KeysDeep<Schemas['DoctorFinding']>>();
  expectTypeOf<Plain<views.RunView>['state']>().toEqualTypeOf<Schemas['RunState']>();
  expectTypeOf<Plain<views.RunView>['stage']>().toEqualTypeOf<Schemas['Run']['stage']>();
});
