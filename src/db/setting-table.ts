import { AppError } from '../lib/errors.js';
import type { SettingTable } from './database.js';
import { isUniqueViolation } from './database-errors.js';
import type { Session } from './session.js';

interface SettingRecord {
  setting_key: string;
  setting_value: string;
}

export function createSettingTable(session: Session): SettingTable {
  const read = (key: string): Promise<SettingRecord | undefined> =>
    session.run('reading a setting', (db) =>
      db<SettingRecord>('settings').where({ setting_key: key }).first(),
    );
  return {
    async getOrCreate(key, value) {
      const known = await read(key);
      if (known !== undefined) return known.setting_value;
      await insertOnce(session, { setting_key: key, setting_value: value });
      const settled = await read(key);
      if (settled === undefined) throw new AppError('INTERNAL', `the setting ${key} was removed`);
      return settled.setting_value;
    },
  };
}

/** The primary key lets the first of several in; the others read what it wrote. */
async function insertOnce(session: Session, record: SettingRecord): Promise<void> {
  await session.run('recording a setting', async (db) => {
    try {
      await db<SettingRecord>('settings').insert(record);
    } catch (error) {
      if (!isUniqueViolation(error)) throw error;
    }
  });
}
