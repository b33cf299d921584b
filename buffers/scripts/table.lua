-- The replay table of adaptd: every command of buffers/redis_table.py, each one atomic.
--
-- KEYS. All share the hash tag {deployment}, so that they live in one slot of a Redis Cluster; nothing else is touched.
--   1  stats           hash    field -> number (traces unless said otherwise):
--                              seq (last trace key), inserted_total, evicted_total, expired_total, sampled_total,
--                              refused:<reason>, bytes:<stratum> (bytes), bytes:stored (bytes, recent and anchors,
--                              each payload once), anchor_ceiling (lot in [0, 1]; absent is 1)
--   2  payload         hash    trace key -> encoded trace (bytes)
--   3  meta            hash    trace key -> JSON [inserted_at (unix s), size (bytes), target_id, domain]
--   4  domains         hash    "<stratum>/<domain>" -> traces
--   5  recent:index    string  packed entries of 20 bytes, slot 0 first: trace key (f64), priority (f64),
--                              times_sampled (u32), little-endian; entries beyond HLEN slots are leftovers
--   6  recent:slots    hash    trace key -> slot (entry number)
--   7  recent:order    zset    trace key, scored by itself: the oldest leaves first
--   8  anchors:index   string  as 5
--   9  anchors:slots   hash    as 6
--  10  anchors:order   zset    trace key, scored by its lot in [0, 1): the highest lot leaves first
--  11  reserved:index  string  as 5
--  12  reserved:slots  hash    as 6
--  13  reserved:order  zset    as 7
--
-- ARGV.
--   1  command
--   2  now (unix s)              3  time-to-live (s; -1 is none)      4  max_bytes (bytes, of bytes:stored)
--   5  anchors (traces)          6  reserved_max_bytes (bytes)        7  salt of the lots
--   8  first trace key of a new table, if none was given out yet
--   9.. of the command:
--      insert    (reserved 0|1, priority, target_id, domain, payload)*  -> {more, trace key | "0" ...}
--      trim                                                              -> {more}
--      size      stratum                                                 -> traces
--      index     stratum                                                 -> packed entries (bytes)
--      read      stratum, count 0|1, trace key*                          -> (payload | false, packed entry | false)*
--      update    (trace key, priority)*                                  -> trace keys known
--      discard   refused reason | "", trace key*                         -> trace keys removed
--      restart                       opens the reservoir (anchor_ceiling back to 1)
--      offer     trace key*          offers traces of recent to the reservoir
--      info                                                              -> {stats, domains, size * 3}
--      reset                         removes everything but seq
-- "more" is 1 while a time-to-live or budget is still exceeded: one call removes at most MAX_REMOVALS traces, so that
-- no call holds the server for long; the caller sends "trim" until it is 0.

local ENTRY, MAX_REMOVALS = 20, 500
local stats, payloads, metas, domains = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local strata = {
  recent = {name = 'recent', index = KEYS[5], slots = KEYS[6], order = KEYS[7]},
  anchors = {name = 'anchors', index = KEYS[8], slots = KEYS[9], order = KEYS[10]},
  reserved = {name = 'reserved', index = KEYS[11], slots = KEYS[12], order = KEYS[13]},
}
local recent, anchors, reserved = strata.recent, strata.anchors, strata.reserved
local now, ttl = tonumber(ARGV[2]), tonumber(ARGV[3])
local max_bytes, capacity, reserved_max_bytes = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])

local function stat(field) return tonumber(redis.call('HGET', stats, field) or '0') end
local function count(field, by) redis.call('HINCRBY', stats, field, by) end
local function holds(s, key) return redis.call('HEXISTS', s.slots, key) == 1 end
local function key_text(number) return string.format('%.0f', number) end

local function meta_of(key)
  local text = redis.call('HGET', metas, key)
  return text and cjson.decode(text)
end

local function add(s, key, score, priority, meta)
  local slot = redis.call('HLEN', s.slots)
  redis.call('SETRANGE', s.index, slot * ENTRY, struct.pack('<ddI4', tonumber(key), priority, 0))
  redis.call('HSET', s.slots, key, slot)
  redis.call('ZADD', s.order, score, key)
  count('bytes:' .. s.name, meta[2])
  redis.call('HINCRBY', domains, s.name .. '/' .. meta[4], 1)
end

-- Takes a trace out of one stratum, and its payload out of the table once no stratum holds it.
local function drop(s, key)
  local slot = redis.call('HGET', s.slots, key)
  if not slot then return false end
  local last = redis.call('HLEN', s.slots) - 1
  if tonumber(slot) ~= last then -- the last entry moves into the gap
    local moved = redis.call('GETRANGE', s.index, last * ENTRY, last * ENTRY + ENTRY - 1)
    redis.call('SETRANGE', s.index, slot * ENTRY, moved)
    redis.call('HSET', s.slots, key_text((struct.unpack('<d', moved))), slot)
  end
  redis.call('HDEL', s.slots, key)
  redis.call('ZREM', s.order, key)
  local meta = meta_of(key) or {0, 0, '', ''} -- absent only if something else deleted it
  local field = s.name .. '/' .. meta[4]
  count('bytes:' .. s.name, -meta[2])
  if redis.call('HINCRBY', domains, field, -1) <= 0 then redis.call('HDEL', domains, field) end
  if not (holds(recent, key) or holds(anchors, key) or holds(reserved, key)) then
    if s ~= reserved then count('bytes:stored', -meta[2]) end
    redis.call('HDEL', payloads, key)
    redis.call('HDEL', metas, key)
  end
  if last == 0 then
    redis.call('DEL', s.index)
    redis.call('HDEL', stats, 'bytes:' .. s.name)
  end
  return true
end

local function oldest(s) return redis.call('ZRANGE', s.order, 0, 0)[1] end

-- Admits a trace to the reservoir if its lot is low enough. The ceiling is the lowest lot ever turned out: whoever
-- drew more must stay out even while there is room, or late traces would be favoured.
local function offer(key, priority, meta)
  local lot = tonumber(string.sub(redis.sha1hex(ARGV[7] .. ':' .. key), 1, 13), 16) / 4503599627370496
  local ceiling = tonumber(redis.call('HGET', stats, 'anchor_ceiling') or '1')
  if lot < ceiling and not holds(anchors, key) then add(anchors, key, lot, priority, meta) end
end

-- Expires, evicts and cuts the reservoir to its capacity. Returns 1 if something is still to be removed.
local left = MAX_REMOVALS
local function trim()
  local function out(s, key, counter)
    if left == 0 then return false end
    left = left - 1
    drop(s, key)
    if counter then count(counter, 1) end
    return true
  end
  while redis.call('ZCARD', anchors.order) > capacity or stat('bytes:anchors') > max_bytes / 2 do
    local top = redis.call('ZRANGE', anchors.order, -1, -1, 'WITHSCORES')
    if not top[1] then break end
    if not out(anchors, top[1]) then return 1 end
    redis.call('HSET', stats, 'anchor_ceiling', top[2])
  end
  if ttl >= 0 then
    for _, s in ipairs({recent, reserved}) do
      local key = oldest(s)
      while key do
        local meta = meta_of(key)
        if meta and tonumber(meta[1]) > now - ttl then break end
        if not out(s, key, 'expired_total') then return 1 end
        key = oldest(s)
      end
    end
  end
  while stat('bytes:stored') > max_bytes do
    local key = oldest(recent)
    if not key then break end
    if not out(recent, key, 'evicted_total') then return 1 end
  end
  while stat('bytes:reserved') > reserved_max_bytes do
    local key = oldest(reserved)
    if not key then break end
    if not out(reserved, key, 'evicted_total') then return 1 end
  end
  return 0
end

local command = {}

function command.insert()
  redis.call('HSETNX', stats, 'seq', ARGV[8])
  local reply = {0}
  for i = 9, #ARGV, 5 do
    local is_reserved, priority, payload = ARGV[i] == '1', tonumber(ARGV[i + 1]), ARGV[i + 4]
    local limit = math.floor((is_reserved and reserved_max_bytes or max_bytes) / 2)
    if #payload > limit then
      count('refused:too_large', 1)
      reply[#reply + 1] = '0'
    else
      local key = key_text(redis.call('HINCRBY', stats, 'seq', 1))
      local meta = {ARGV[2], #payload, ARGV[i + 2], ARGV[i + 3]}
      redis.call('HSET', payloads, key, payload)
      redis.call('HSET', metas, key, cjson.encode(meta))
      if is_reserved then
        add(reserved, key, key, priority, meta)
      else
        count('bytes:stored', #payload)
        add(recent, key, key, priority, meta)
        offer(key, priority, meta)
      end
      count('inserted_total', 1)
      reply[#reply + 1] = key
      reply[1] = trim() -- after each trace: a batch never exceeds the budget, and the reservoir is cut in order
    end
  end
  return reply
end

function command.trim() return {trim()} end

function command.size() return redis.call('HLEN', strata[ARGV[9]].slots) end

function command.index()
  local s = strata[ARGV[9]]
  local n = redis.call('HLEN', s.slots)
  return n == 0 and '' or redis.call('GETRANGE', s.index, 0, n * ENTRY - 1)
end

function command.read()
  local s, counted, reply, read = strata[ARGV[9]], ARGV[10] == '1', {}, 0
  for i = 11, #ARGV do
    local slot = redis.call('HGET', s.slots, ARGV[i])
    local payload = slot and redis.call('HGET', payloads, ARGV[i])
    if slot and not payload then drop(s, ARGV[i]) end -- taken from outside: forget it
    local entry = false
    if payload then
      entry = redis.call('GETRANGE', s.index, slot * ENTRY, slot * ENTRY + ENTRY - 1)
      if counted then
        local _, _, times = struct.unpack('<ddI4', entry)
        entry = string.sub(entry, 1, 16) .. struct.pack('<I4', times + 1)
        redis.call('SETRANGE', s.index, slot * ENTRY, entry)
        read = read + 1
      end
    end
    reply[#reply + 1] = payload
    reply[#reply + 1] = entry
  end
  if read > 0 then count('sampled_total', read) end
  return reply
end

function command.update()
  local known = 0
  for i = 9, #ARGV, 2 do
    local found = 0
    for _, s in pairs(strata) do
      local slot = redis.call('HGET', s.slots, ARGV[i])
      if slot then
        redis.call('SETRANGE', s.index, slot * ENTRY + 8, struct.pack('<d', tonumber(ARGV[i + 1])))
        found = 1
      end
    end
    known = known + found
  end
  return known
end

function command.discard()
  local removed = 0
  for i = 10, #ARGV do
    local found = 0
    for _, s in pairs(strata) do
      if drop(s, ARGV[i]) then found = 1 end
    end
    removed = removed + found
  end
  if ARGV[9] ~= '' and removed > 0 then count('refused:' .. ARGV[9], removed) end
  return removed
end

function command.restart() return redis.call('HDEL', stats, 'anchor_ceiling') end

function command.offer()
  for i = 9, #ARGV do
    local slot, meta = redis.call('HGET', recent.slots, ARGV[i]), meta_of(ARGV[i])
    if slot and meta then
      local entry = redis.call('GETRANGE', recent.index, slot * ENTRY, slot * ENTRY + ENTRY - 1)
      local _, priority = struct.unpack('<dd', entry)
      offer(ARGV[i], priority, meta)
    end
  end
  return {trim()}
end

function command.info()
  local reply = {redis.call('HGETALL', stats), redis.call('HGETALL', domains)}
  for _, s in ipairs({recent, anchors, reserved}) do reply[#reply + 1] = redis.call('HLEN', s.slots) end
  return reply
end

function command.reset()
  local seq = redis.call('HGET', stats, 'seq')
  redis.call('UNLINK', unpack(KEYS))
  if seq then redis.call('HSET', stats, 'seq', seq) end
  return 1
end

return command[ARGV[1]]()
