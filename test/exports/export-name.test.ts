import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { isExportName, makeBackupExportName, parseBackupExportName } from '../../src/exports/index.js';
import { newUlid } from '../../src/lib/id.js';

const LAYER = '01KB8ZJ5V6QW3M9T2XAHC4DEFG';
const AT = Date.UTC(2026, 10, 21, 12, 0, 5);
const parts = { vmName: 'web', diskNumber: 0, type: 'incr' as const, createdAtMs: AT, layerId: LAYER };

describe('names of backup exports', () => {
  test('are made of machine, disk, type, time and id', () => {
    const name = makeBackupExportName(parts);
    expect(name).toBe('backup-web-disk0-incr-20261121T120005Z-ahc4defg');
    expect(parseBackupExportName(name)).toEqual({
      vm: 'web',
      diskNumber: 0,
      type: 'incr',
      createdAtMs: AT,
      id: 'ahc4defg',
    });
  });

  test('are parsed from the right: a machine may be called like the rest', () => {
    for (const vmName of ['db-disk1', 'backup-x-disk0', 'disk7-full', 'a-disk1-full']) {
      const name = makeBackupExportName({ ...parts, vmName });
      expect(parseBackupExportName(name)).toMatchObject({ vm: vmName, diskNumber: 0, type: 'incr' });
    }
  });

  test('two machines with the same 60 characters in front differ, also in the same second', () => {
    const front = 'm'.repeat(60);
    const names = ['a', 'b'].map((end) => makeBackupExportName({ ...parts, vmName: front + end }));
    expect(new Set(names).size).toBe(2);
  });

  test('a machine name with other characters cannot be taken for another one', () => {
    const names = ['a b', 'a_b', 'a/b', '../b', 'ä', ''].map((vmName) =>
      makeBackupExportName({ ...parts, vmName }),
    );
    expect(new Set(names).size).toBe(names.length);
    expect(names.every(isExportName)).toBe(true);
  });

  test('hold together for any machine, disk and time', () => {
    const anyParts = fc.record({
      vmName: fc.oneof(fc.string({ maxLength: 80 }), fc.string({ unit: 'binary', maxLength: 80 })),
      diskNumber: fc.integer({ min: 0, max: 999_999 }),
      type: fc.constantFrom('full' as const, 'incr' as const),
      createdAtMs: fc.integer({ min: 0, max: Date.UTC(9999, 11, 31, 23, 59, 59) }),
      layerId: fc.integer({ min: 0, max: 2 ** 40 }).map((ms) => newUlid(ms)),
    });
    fc.assert(
      fc.property(anyParts, (any) => {
        const name = makeBackupExportName(any);
        expect(isExportName(name)).toBe(true);
        expect(name).toBe(makeBackupExportName(any));
        expect(parseBackupExportName(name)).toEqual({
          vm: expect.any(String) as string,
          diskNumber: any.diskNumber,
          type: any.type,
          createdAtMs: Math.floor(any.createdAtMs / 1000) * 1000,
          id: any.layerId.slice(-8).toLowerCase(),
        });
        expect(makeBackupExportName({ ...any, vmName: `${any.vmName}x` })).not.toBe(name);
      }),
    );
  });

  test.each([
    ['another kind', 'migration-vol-abc'],
    ['no such day', 'backup-web-disk0-full-20260231T000000Z-ahc4defg'],
    ['no such hour', 'backup-web-disk0-full-20260201T250000Z-ahc4defg'],
    ['a disk with a leading zero', 'backup-web-disk01-full-20260201T000000Z-ahc4defg'],
    ['an id with letters that no ULID has', 'backup-web-disk0-full-20260201T000000Z-ahc4deiu'],
    ['more behind', 'backup-web-disk0-full-20260201T000000Z-ahc4defg-x'],
    ['64 characters', `backup-${'w'.repeat(20)}-disk0-full-20260201T000000Z-ahc4defg`],
  ])('%s is none', (_what, name) => {
    expect(parseBackupExportName(name)).toBeNull();
  });

  test('a disk number or a year that no name can hold is refused', () => {
    expect(() => makeBackupExportName({ ...parts, diskNumber: -1 })).toThrow(/not the number/);
    expect(() => makeBackupExportName({ ...parts, createdAtMs: Date.UTC(10_000, 0) })).toThrow(/four digits/);
  });

  test('export names have 1 to 63 plain characters', () => {
    expect(isExportName('a'.repeat(63))).toBe(true);
    for (const bad of ['', 'a'.repeat(64), '-a', '.a', 'a b', 'a/b', 'a\n', 'ä'])
      expect(isExportName(bad)).toBe(false);
  });
});
